package h3

import (
	"math"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// quic-go gives a connection's window back as its streams are read: one that bounds anything is used
// up by streams that nobody reads, and then holds up all others. Ours bounds nothing. What a peer may
// send unread are the windows of its streams, which are memory of a hbone.Budget:
//
//	open ─► firstWindow          of which firstReserved is reserved: few streams ever hold more
//	   ─► ×2 … StreamWindow      reserved before, while the stream is read fast
//	   ─► as it is               reserved in full, when its user stops to read
//	   ─► 0                      with the stream
//
// quic-go doubles the window of a stream and asks nobody, when a part of it, more than half, was read
// within four times that part of a round trip. So streams are read by eighths of their windows. When
// three of them took less than growTrips round trips, that may happen with the next ones: they are not
// read before there is memory for twice the window, or that time is over.
const (
	firstWindow   = 32 << 10
	firstReserved = 6 << 10
	connWindow    = math.MaxInt32 << 10 // bounds nothing

	// A connection reserves as much for each unidirectional stream, of which RFC 9114 section 6.2
	// asks for three.
	maxUniStreams = 16
	connReserved  = maxUniStreams * firstReserved

	growTrips = 4
	growSpare = 4 // growth leaves room for as many others of its size
)

// window is what the peer may send unread of one stream. One goroutine reads the stream.
type window struct {
	limit int
	size  int

	read  int          // of an eighth
	since [3]time.Time // when the last eighths were begun, the oldest first; the next one may be to come

	mu sync.Mutex
	reserved
}

// reserved is memory of a budget.
type reserved struct {
	budget hbone.Budget
	n      int
}

// reserve takes n bytes.
func reserve(b hbone.Budget, n int) (reserved, error) {
	if !b.Take(n) {
		b.Short()
		return reserved{}, hbone.ErrNoBuffers
	}
	return reserved{b, n}, nil
}

// give returns them.
func (r *reserved) give() {
	r.budget.Give(r.n)
	r.budget, r.n = fixed{}, 0
}

// newWindow reserves what a stream begins with. With an error it returns a fixedWindow.
func (c *Config) newWindow() (*window, error) {
	r, err := reserve(c.Budget, firstReserved)
	if err != nil {
		return fixedWindow(), err
	}
	return &window{limit: int(c.StreamWindow), size: firstWindow, reserved: r}, nil
}

// fixedWindow is one that does not grow.
func fixedWindow() *window {
	return &window{limit: math.MaxInt, size: firstWindow, reserved: reserved{budget: fixed{}}}
}

// stretch is how much may be read before it is time for took.
func (w *window) stretch() int {
	if w.size >= w.limit {
		return math.MaxInt
	}
	return w.size/8 - w.read
}

// took notes that n bytes were read.
func (w *window) took(n int, roundTrip time.Duration) {
	if w.read += n; w.size >= w.limit || w.read < w.size/8 {
		return
	}
	now := time.Now()
	pause := growTrips*roundTrip - now.Sub(w.since[0])
	if pause < 0 || w.grow() {
		pause = 0
	}
	w.read = 0
	w.since = [3]time.Time{w.since[1], w.since[2], now.Add(pause)}
}

// grow doubles the window if there is memory for that.
func (w *window) grow() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	size := min(2*w.size, w.limit)
	if !w.budget.Grow(size-w.n, growSpare*size) {
		w.budget.Short()
		return false
	}
	w.size, w.n = size, size
	return true
}

// stopped reserves all of the window, since the peer may fill it now.
func (w *window) stopped() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if more := w.size - w.n; more > 0 && w.budget.Take(more) {
		w.n = w.size
	}
}

func (w *window) give() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reserved.give()
}

// reader reads at the pace that the stream's window allows.
type reader struct {
	source
	conn   *quic.Conn
	window *window
}

// Peek waits as the pace wants it, and for bytes.
func (r reader) Peek(p []byte) (int, error) {
	if pause := time.Until(r.window.since[2]); pause > 0 {
		select {
		case <-time.After(pause):
		case <-r.conn.Context().Done():
		}
	}
	return r.source.Peek(p)
}

func (r reader) Read(p []byte) (int, error) {
	n, err := r.source.Read(p[:min(len(p), r.window.stretch())])
	r.window.took(n, r.conn.ConnectionStats().SmoothedRTT)
	return n, err
}

// fixed is a budget that has no memory: that of windows that stay as they are.
type fixed struct{ hbone.Unlimited }

func (fixed) Take(int) bool      { return false }
func (fixed) Grow(int, int) bool { return false }
