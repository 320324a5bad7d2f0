package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"sync"

	"github.com/raceway-mesh/raceway/hbone"
)

// datagramTransport carries one flow of datagrams on each TLS connection, and nothing else: a
// request as a line of JSON, an answer of two bytes, then datagrams behind their lengths.
type datagramTransport struct{}

type datagramRequest struct {
	Authority    string
	ForwardedFor string
}

// refusedMark in the place of a length tells of a closed port.
const refusedMark = 0xffff

func (datagramTransport) NewSession(_ context.Context, conn *tls.Conn) (hbone.Session, error) {
	return &datagramSession{conn: conn, done: make(chan struct{})}, nil
}

type datagramSession struct {
	conn *tls.Conn
	done chan struct{}
	end  sync.Once

	mu   sync.Mutex
	used bool
}

func (s *datagramSession) Start(*hbone.Request) (hbone.Opening, error) {
	return nil, errors.New("it carries UDP alone")
}

func (s *datagramSession) OpenDatagrams(_ context.Context, r *hbone.Request, first [][]byte) (hbone.DatagramStream, *hbone.Response, error) {
	line, err := json.Marshal(datagramRequest{Authority: r.Authority, ForwardedFor: r.Forwarded.For.String()})
	if err != nil {
		return nil, nil, err
	}
	stream := newDatagramStream(s.conn, bufio.NewReader(s.conn), func() { _ = s.Close() })
	if _, err := s.conn.Write(append(line, '\n')); err != nil {
		return nil, nil, err
	}
	for _, p := range first {
		if err := stream.Send(p, true); err != nil {
			return nil, nil, err
		}
	}
	var status [2]byte
	if _, err := io.ReadFull(stream.r, status[:]); err != nil {
		return nil, nil, err
	}
	if code := int(binary.BigEndian.Uint16(status[:])); code != 200 {
		_ = s.Close()
		return nil, nil, &hbone.StatusError{Status: code}
	}
	return stream, &hbone.Response{}, nil
}

func (s *datagramSession) Reserve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := !s.used
	s.used = true
	return free
}

func (s *datagramSession) Release() {}

func (s *datagramSession) Capacity() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used {
		return 0
	}
	return 1
}

// Retire has nothing to wait for: its one flow ends the connection.
func (s *datagramSession) Retire() error {
	if s.Reserve() {
		return s.Close()
	}
	return nil
}

func (s *datagramSession) Streams() int          { return 1 - s.Capacity() }
func (s *datagramSession) Busy() bool            { return false }
func (s *datagramSession) Done() <-chan struct{} { return s.done }

func (s *datagramSession) Close() error {
	s.end.Do(func() { close(s.done) })
	return s.conn.Close()
}

func (datagramTransport) ServeConn(ctx, force context.Context, conn *tls.Conn, serve func(*hbone.ServerRequest)) error {
	defer conn.Close()
	defer context.AfterFunc(force, func() { _ = conn.Close() })()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // it drains none
	r := bufio.NewReader(conn)
	line, err := r.ReadBytes('\n')
	if err != nil {
		return nil // the client had no use for it
	}
	var request datagramRequest
	if err := json.Unmarshal(line, &request); err != nil {
		return err
	}
	live, cancel := context.WithCancel(context.Background())
	defer cancel()
	answer := func(status int) error {
		_, err := conn.Write(binary.BigEndian.AppendUint16(nil, uint16(status)))
		return err
	}
	stream := newDatagramStream(conn, r, cancel)
	out := &hbone.ServerRequest{
		Protocol: hbone.UDP, Conn: hbone.NewConn(conn), Context: live,
		AcceptDatagrams: func(hbone.Response) (hbone.DatagramStream, error) { return stream, answer(200) },
		Reject:          func(status int) { _ = answer(status) },
	}
	out.Authority = request.Authority
	out.Target = netip.MustParseAddrPort(request.Authority)
	out.Forwarded.For = netip.MustParseAddrPort(request.ForwardedFor)
	serve(out)
	stream.wait()
	return nil
}

type datagramStream struct {
	conn  *tls.Conn
	r     *bufio.Reader
	ended func()

	mu      sync.Mutex // orders what is sent
	reading sync.WaitGroup
}

func newDatagramStream(conn *tls.Conn, r *bufio.Reader, ended func()) *datagramStream {
	return &datagramStream{conn: conn, r: r, ended: ended}
}

func (s *datagramStream) Send(p []byte, fragment bool) error {
	if !fragment && len(p) > 1000 {
		return &hbone.TooLargeError{Max: 1000}
	}
	return s.write(append(binary.BigEndian.AppendUint16(nil, uint16(len(p))), p...))
}

func (s *datagramStream) write(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.conn.Write(b)
	return err
}

func (s *datagramStream) Deliver(sink hbone.DatagramSink) {
	s.reading.Go(func() {
		err := s.read(sink)
		s.ended()
		sink.End(err)
	})
}

func (s *datagramStream) read(sink hbone.DatagramSink) error {
	for {
		var head [2]byte
		if _, err := io.ReadFull(s.r, head[:]); err != nil {
			return nil
		}
		n := binary.BigEndian.Uint16(head[:])
		if n == refusedMark {
			return hbone.PortClosedError{}
		}
		p := make([]byte, n)
		if _, err := io.ReadFull(s.r, p); err != nil {
			return nil
		}
		sink.Datagram(p)
	}
}

func (s *datagramStream) Refuse() error {
	return s.write(binary.BigEndian.AppendUint16(nil, refusedMark))
}

func (s *datagramStream) Drops() hbone.DatagramDrops { return hbone.DatagramDrops{} }
func (s *datagramStream) Close() error               { return s.conn.Close() }
func (s *datagramStream) wait()                      { s.reading.Wait() }
