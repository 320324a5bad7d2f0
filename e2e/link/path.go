package link

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// Path is what happens to the packets that go one way. The zero value carries all at once.
type Path struct {
	// Delay is how long a packet is under way: half of what it adds to the round trip.
	Delay time.Duration
	// Loss is the share of packets that get lost, 0 to 1.
	Loss float64
	// Reorder is the share of packets that overtake those before them: they skip Delay.
	Reorder float64
	// Rate is how many bits a second pass, IP headers included. 0 means that there is no
	// bound.
	Rate int64
	// Queue is how long packets wait for Rate at the most; more are dropped. 0 means 50 ms.
	Queue time.Duration
	// Seed is of the random choices, which are the same for the same sequence of packets.
	Seed uint64
}

func (p Path) withDefaults() Path {
	if p.Queue == 0 {
		p.Queue = 50 * time.Millisecond
	}
	return p
}

// Validate reports what of p makes no sense.
func (p Path) Validate() error {
	var err error
	for name, share := range map[string]float64{"loss": p.Loss, "reorder": p.Reorder} {
		if !(share >= 0 && share <= 1) {
			err = errors.Join(err, fmt.Errorf("%s of %v is no share of 0 to 1", name, share))
		}
	}
	if p.Delay < 0 || p.Queue < 0 || p.Rate < 0 {
		err = errors.Join(err, errors.New("delay, queue and rate are not negative"))
	}
	return err
}

// fate is what becomes of a packet.
type fate uint8

const (
	carried  fate = iota
	lost          // by Loss
	overflow      // of the queue for Rate
)

// schedule decides the fate of one packet after the other. It has no clock of its own.
type schedule struct {
	path   Path
	random *rand.Rand
	free   time.Time // when the line has sent all that waits
}

func newSchedule(p Path) *schedule {
	return &schedule{path: p.withDefaults(), random: rand.New(rand.NewPCG(p.Seed, 0))} //nolint:gosec // what gets lost is no secret
}

// admit takes a packet of size bytes at now, and tells when it arrives.
func (s *schedule) admit(now time.Time, size int) (time.Time, fate) {
	// Each packet uses up as many random numbers, whatever becomes of it.
	lose, overtake := s.random.Float64() < s.path.Loss, s.random.Float64() < s.path.Reorder
	sent := now
	if s.path.Rate > 0 {
		if s.free.Before(now) {
			s.free = now
		}
		if s.free.Sub(now) > s.path.Queue {
			return time.Time{}, overflow
		}
		s.free = s.free.Add(time.Duration(int64(size) * 8 * int64(time.Second) / s.path.Rate))
		sent = s.free
	}
	switch {
	case lose: // on the way, so that it takes its time on the line
		return time.Time{}, lost
	case overtake:
		return sent, carried
	}
	return sent.Add(s.path.Delay), carried
}
