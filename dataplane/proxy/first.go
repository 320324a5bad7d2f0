package proxy

import (
	"errors"

	"github.com/raceway-mesh/raceway/hbone"
)

// firstBytes lends what an application says before its tunnel is open a small buffer of the
// pod's budget, as much as a peer of ours takes before it answers. Without one, first is nil and
// nothing is read before. give ends the loan.
func (s *servedPod) firstBytes(app *tcpLeg) (first *hbone.First, give func()) {
	w := windows{&s.buffers}
	if !w.Take(smallBuffer) {
		return nil, func() {}
	}
	buf := s.buffers.take(false)
	return hbone.NewFirst(beginning{app, s.Proxy}, buf.p), func() {
		s.buffers.give(buf)
		w.Give(smallBuffer)
	}
}

// beginning is an application's socket before its connection is up.
type beginning struct {
	*tcpLeg
	proxy *Proxy
}

func (b beginning) Recv(p []byte) (int, error) { return b.conn.Recv(p) }

// Notify has the lot that the connection is to be in tell.
func (b beginning) Notify(tunnel *hbone.Conn, ready chan<- struct{}) {
	// Without room in the lot the first bytes wait for the answer.
	_ = b.park(b.proxy.lotOf(tunnel), moving, func(*round) func() {
		select {
		case ready <- struct{}{}:
		default: // it was told
		}
		return func() {} // until it was read
	})
}

// isFinal reports whether no other endpoint may be asked after err: the peer's policy refused
// the connection, or may have let its application see bytes that another's would see again.
func isFinal(err error) bool {
	var status *hbone.StatusError
	return errors.Is(err, hbone.ErrUncertain) || errors.As(err, &status) && status.Status == 401
}
