package h2

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone"
)

// clientState is what only a client's connection has, guarded by conn.mu.
type clientState struct {
	settings chan struct{} // closed, by settled, when the peer's are there
	settled  sync.Once
	reserved int
	load     hbone.Load
}

// session is a hbone.Session.
type session struct{ *conn }

func newSession(cfg Client, t *tls.Conn) (*session, error) {
	c, err := newConn(t, values{
		pingInterval: cfg.PingInterval, pingTimeout: cfg.PingTimeout,
		streamWindow: cfg.StreamWindow, connWindow: cfg.ConnWindow, budget: cfg.Budget,
		maxHeaderList: hbone.MaxResponseHeaderList,
	}.withDefaults())
	if err != nil {
		return nil, err
	}
	c.client = &clientState{settings: make(chan struct{}), load: hbone.NewLoad()}
	c.remote = hbone.NewConn(t).Remote
	c.hello(http2.ClientPreface, http2.Setting{ID: http2.SettingEnablePush, Val: 0})
	go func() {
		// What ended it reaches whoever has a stream; a session without one just ends.
		_ = c.run()
	}()
	return &session{c}, nil
}

var (
	errFull     = errors.New("session carries all the streams that it may")
	errNoIDs    = errors.New("session has used up its stream numbers")
	errNoAnswer = errors.New("tunnel connection lost before the answer")
)

// errGoAway is why a stream that a GOAWAY excludes was not processed.
func errGoAway(f *http2.GoAwayFrame) error {
	return fmt.Errorf("peer sent GOAWAY %s %s", f.ErrCode, strconv.QuoteToASCII(string(f.DebugData()[:min(len(f.DebugData()), 128)])))
}

// Start uses up the reservation and queues CONNECT.
func (s *session) Start(r *hbone.Request) (hbone.Opening, error) {
	o, err := s.begin(r, hbone.TCP)
	if err != nil {
		return nil, err
	}
	return o, nil
}

// connectFields is how many fields most requests have.
const connectFields = 6

func (s *session) begin(r *hbone.Request, protocol hbone.Protocol) (*opening, error) {
	fields := make([]hpack.HeaderField, 0, connectFields)
	err := r.ConnectFields(protocol, s.remote, func(name, value string) {
		fields = append(fields, hpack.HeaderField{Name: name, Value: value, Sensitive: hbone.IsUnique(name)})
	})

	s.mu.Lock()
	defer s.mu.Unlock()
	s.client.reserved = max(0, s.client.reserved-1)
	switch {
	case err != nil:
		return nil, err
	case s.conn.err != nil:
		return nil, refused(s.conn.err)
	case s.draining:
		return nil, refused(errDrained)
	case s.lastID >= maxStreamID-1:
		return nil, refused(errNoIDs)
	case len(s.streams) >= int(s.peer.maxStreams):
		return nil, refused(errFull)
	}
	if size := listSize(fields); size > s.peer.maxHeaderList {
		return nil, fmt.Errorf("request headers of %d bytes are more than the peer takes (%d)", size, s.peer.maxHeaderList)
	}
	id := s.lastID + 2
	if s.lastID == 0 {
		id = 1
	}
	st := s.newStreamLocked(id)
	if !st.reserveLocked() {
		delete(s.streams, id)
		return nil, hbone.ErrNoBuffers
	}
	s.lastID, s.seenID = id, id
	st.settled = make(chan struct{})
	s.pushLocked(control{kind: controlHeaders, stream: st.id, fields: fields})
	st.startLocked()
	return &opening{st}, nil
}

// listSize is a header list's size as RFC 9113 section 6.5.2 counts.
func listSize(fields []hpack.HeaderField) uint64 {
	var size uint64
	for _, f := range fields {
		size += uint64(f.Size())
	}
	return size
}

// responseLocked takes in the answer to CONNECT.
func (c *conn) responseLocked(f *http2.MetaHeadersFrame) error {
	s := c.streams[f.StreamID]
	if s == nil {
		if c.isIdleLocked(f.StreamID) {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		return nil
	}
	status, err := strconv.Atoi(f.PseudoValue("status"))
	switch {
	case s.answered, f.Truncated, err != nil, status < 100, status > 999:
		// On a connected stream there is only DATA (RFC 9113 section 8.5).
		s.resetLocked(http2.ErrCodeProtocol)
	case status < 200:
		if f.StreamEnded() {
			s.resetLocked(http2.ErrCodeProtocol)
		}
	case status != 200:
		s.status = status
		s.recvEnd = f.StreamEnded()
		s.closeLocked(http2.ErrCodeCancel)
	default:
		s.answered, s.response = true, &hbone.Response{}
		for _, field := range f.RegularFields() {
			s.response.SetField(field.Name, field.Value)
		}
		s.settleLocked()
		if f.StreamEnded() {
			s.endedLocked()
		}
	}
	return nil
}

// Reserve sets a place aside.
func (s *session) Reserve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.capacityLocked() == 0 {
		return false
	}
	s.client.reserved++
	return true
}

// Release gives a reservation back.
func (s *session) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.client.reserved = max(0, s.client.reserved-1)
}

// Capacity is how many more streams it takes.
func (s *session) Capacity() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.capacityLocked()
}

func (s *session) capacityLocked() int {
	if s.conn.err != nil || s.draining || s.lastID >= maxStreamID-1 {
		return 0
	}
	return max(0, int(s.peer.maxStreams)-len(s.streams)-s.client.reserved)
}

// Streams is how many it carries.
func (s *session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

// Done is closed when the connection has ended.
func (s *session) Done() <-chan struct{} { return s.done }

// Close ends it at once.
func (s *session) Close() error {
	s.shut(errConnClosed, http2.ErrCodeNo)
	return nil
}

// Retire ends it when its streams have ended. TCP delivers what was sent before.
func (s *session) Retire() error {
	s.mu.Lock()
	defer s.release()
	s.draining = true
	s.conn.settleLocked()
	return nil
}

// Busy tells of the time since it was asked last.
func (s *session) Busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client.load.Busy(s.moved)
}
