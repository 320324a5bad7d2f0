package proxy

import (
	"errors"

	"github.com/raceway-mesh/raceway/hbone"
)

// firstBytes lends what an application says before its tunnel is open a small buffer of the
// pod's budget, as much as a peer of ours takes before it answers. Without one, first is nil and
// nothing is read before. give ends the loan.
func (s *servedPod) firstBytes(app Socket) (first *hbone.First, give func(), err error) {
	w := windows{&s.buffers}
	if !w.Take(smallBuffer) {
		return nil, func() {}, nil
	}
	buf := s.buffers.take(false)
	give = func() {
		s.buffers.give(buf)
		w.Give(smallBuffer)
	}
	if first, err = hbone.NewFirst(app, buf.p); err != nil {
		give()
		return nil, nil, err
	}
	return first, give, nil
}

// isFinal reports whether no other endpoint may be asked after err: the peer's policy refused
// the connection, or may have let its application see bytes that another's would see again.
func isFinal(err error) bool {
	var status *hbone.StatusError
	return errors.Is(err, hbone.ErrUncertain) || errors.As(err, &status) && status.Status == 401
}
