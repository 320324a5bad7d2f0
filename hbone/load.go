package hbone

import "time"

// A session that moved busyRate bytes a second, in either direction, is busy: at that rate some
// of what is sent waits behind the rest. It is looked at once in busyPause, when somebody asks.
const (
	busyRate  = 1 << 20
	busyPause = 50 * time.Millisecond
)

// Load is what a transport's Session.Busy is made of. Its owner guards it.
type Load struct {
	at    time.Time // when it was looked at
	moved uint64    // then
	busy  bool
}

// NewLoad is that of a session that begins.
func NewLoad() Load { return Load{at: time.Now()} }

// Busy tells of the time since it was looked at last; moved is how many bytes the session has
// moved since it began.
func (l *Load) Busy(moved uint64) bool {
	now := time.Now()
	if pause := now.Sub(l.at); pause >= busyPause {
		l.busy = float64(moved-l.moved) > busyRate*pause.Seconds()
		l.at, l.moved = now, moved
	}
	return l.busy
}
