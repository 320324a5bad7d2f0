package h3_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

var request = &hbone.Request{Authority: "10.0.0.2:3306"}

// newClient is a pool on the world's client node; f may change it.
func (w *world) newClient(t testing.TB, f func(*hbone.ClientConfig)) *hbone.Client {
	t.Helper()
	cfg := hbone.ClientConfig{
		TLS:       func(context.Context, hbone.Key) (*tls.Config, error) { return w.clientTLS, nil },
		Connector: w.client.endpoint,
	}
	if f != nil {
		f(&cfg)
	}
	c := hbone.NewClient(cfg)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestClientPoolsSessions(t *testing.T) {
	for name, addr := range loopbacks() {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, addr, hbonetest.Echo, nil)
			c := w.newClient(t, nil)
			for i := range 3 {
				tunnel, err := c.Open(t.Context(), w.key, request)
				if err != nil {
					t.Fatal(err)
				}
				if tunnel.Reused != (i > 0) || tunnel.Conn.Remote != w.key.Remote || len(tunnel.Conn.TLS.PeerCertificates) != 1 || !tunnel.Conn.Local.IsValid() {
					t.Errorf("tunnel %d: reused %v, %+v", i, tunnel.Reused, tunnel.Conn)
				}
				hbonetest.Ping(t, tunnel)
				_ = tunnel.Close()
			}
			if s := c.Stats(); s.Dials != 1 || s.Sessions != 1 {
				t.Errorf("stats = %+v", s)
			}
		})
	}
}

func TestHandshakeFailuresAreClassedAsOnTCP(t *testing.T) {
	other := hbonetest.NewCA(t)
	expired := func(ca *hbonetest.CA) tls.Certificate {
		return ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ClientID}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(-time.Minute)})
	}
	for name, test := range map[string]struct {
		change func(w *world, c *tls.Config)
		want   hbone.TLSCause
	}{
		"wrong identity": {func(w *world, c *tls.Config) {
			c.VerifyConnection = w.ca.ClientTLS(t, hbonetest.ClientID, "spiffe://cluster.local/ns/demo/sa/other").VerifyConnection
		}, hbone.TLSWrongIdentity},
		"unknown authority": {func(_ *world, c *tls.Config) {
			c.VerifyConnection = other.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID).VerifyConnection
		}, hbone.TLSUnknownCA},
		"no certificate": {func(_ *world, c *tls.Config) { c.Certificates = nil }, hbone.TLSNoCertificate},
		"rejected": {func(_ *world, c *tls.Config) {
			c.Certificates = []tls.Certificate{other.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ClientID}})}
		}, hbone.TLSRejected},
		"expired": {func(w *world, c *tls.Config) { c.Certificates = []tls.Certificate{expired(w.ca)} }, hbone.TLSExpired},
	} {
		t.Run(name, func(t *testing.T) {
			failed := make(chan error, 16)
			w := newWorld(t, "127.0.0.1", hbonetest.Echo, func(_ *h3.Config, s *hbone.ServerConfig) {
				s.OnHandshakeError = func(_ netip.AddrPort, err error) { failed <- err }
			})
			w.clientTLS = w.clientTLS.Clone()
			test.change(w, w.clientTLS)
			c := w.newClient(t, nil)
			_, err := c.Open(t.Context(), w.key, request)
			var te *hbone.TLSError
			if !errors.As(err, &te) || te.Cause != test.want {
				t.Fatalf("Open = %v, want a TLSError of %s", err, test.want)
			}
			if c.Stats().TLSFailures[test.want] != 1 {
				t.Errorf("stats = %+v", c.Stats())
			}
			// The server's side of it.
			if err := <-failed; !errors.As(err, &te) {
				t.Errorf("server was told %v", err)
			}
		})
	}
}

func TestSilentPeerIsADialErrorThatNamesTheCause(t *testing.T) {
	w := newWorld(t, "127.0.0.1", hbonetest.Echo, nil)
	hole, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hole.Close() }()
	w.key.Remote = hole.LocalAddr().(*net.UDPAddr).AddrPort()
	c := w.newClient(t, func(c *hbone.ClientConfig) { c.ConnectTimeout = 300 * time.Millisecond })
	_, err = c.Open(t.Context(), w.key, request)
	var de *hbone.DialError
	if !errors.As(err, &de) || !de.Timeout() {
		t.Fatalf("Open = %v, want a DialError that timed out", err)
	}
	if s := c.Stats(); s.DialFailures != 1 {
		t.Errorf("stats = %+v", s)
	}
}

// Whoever shares a port out among endpoints goes by the mark in what they ask to be called.
func TestConnectionIDsBeginWithTheMark(t *testing.T) {
	peer, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	ca := hbonetest.NewCA(t)
	client := newNode(t, "127.0.0.1", h3.Config{Mark: [2]byte{0xab, 0xcd}})
	key := hbone.Key{Remote: peer.LocalAddr().(*net.UDPAddr).AddrPort(), Local: client.addr.Addr()}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	defer func() {
		cancel()
		<-done
	}()
	config := ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
	go func() {
		defer close(done)
		_, _, _ = client.endpoint.Connect(ctx, key, config) // nobody answers
	}()
	b := make([]byte, 2048)
	if err := peer.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, _, err := peer.ReadFromUDPAddrPort(b)
	if err != nil || n < 1200 {
		t.Fatalf("%d bytes, %v; want a first packet", n, err)
	}
	source := b[6+int(b[5]):] // RFC 8999 section 5.1
	if source[0] != 8 || source[1] != 0xab || source[2] != 0xcd {
		t.Errorf("its ID is %x, want 8 bytes that begin with abcd", source[1:][:source[0]])
	}
}

func TestClosedEndpointRefusesToConnect(t *testing.T) {
	w := newWorld(t, "127.0.0.1", hbonetest.Echo, nil)
	s := w.connect(t)
	w.server.drain()
	w.server.force()
	<-s.Done()
	if s.Capacity() != 0 || s.Reserve() {
		t.Error("a session that has ended takes streams")
	}
	if _, err := s.Start(request); !errors.Is(err, hbone.ErrRefused) {
		t.Errorf("Start = %v, want ErrRefused", err)
	}
	if _, _, err := s.OpenDatagrams(t.Context(), request, nil); !errors.Is(err, hbone.ErrRefused) {
		t.Errorf("OpenDatagrams = %v, want ErrRefused", err)
	}
}

// A draining server loses no stream: live ones run on, new ones go to another session.
func TestDrainLosesNothing(t *testing.T) {
	w := newWorld(t, "127.0.0.1", hbonetest.Echo, nil)
	s := w.connect(t)
	live, _, err := hbonetest.Open(t.Context(), s, request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = live.Close() }()
	hbonetest.Ping(t, live)
	w.server.drain()
	for s.Capacity() != 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := s.Start(request); !errors.Is(err, hbone.ErrRefused) {
		t.Errorf("Start = %v, want ErrRefused", err)
	}
	hbonetest.Ping(t, live)
	if _, err := live.Write([]byte("last")); err != nil {
		t.Fatal(err)
	}
	if err := live.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if all, err := io.ReadAll(live); string(all) != "last" || err != nil {
		t.Errorf("read %q, %v", all, err)
	}
	_ = live.Close()
	<-s.Done() // by the client's GOAWAY, without a timeout
}

// What a client sent and ended is read to its end, though the client's session retires.
func TestRetiredSessionLeavesTheServerItsTime(t *testing.T) {
	const total = 30 << 10 // a new window has room for it
	retired, read := make(chan struct{}), make(chan int, 1)
	w := newWorld(t, "127.0.0.1", func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			return
		}
		_ = s.CloseWrite()
		<-retired
		time.Sleep(50 * time.Millisecond) // a reader that is slower than the close
		all, err := io.ReadAll(s)
		if err != nil {
			t.Error(err)
		}
		read <- len(all)
	}, nil)
	s := w.connect(t)
	st, _, err := hbonetest.Open(t.Context(), s, request)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write(make([]byte, total)); err != nil {
		t.Fatal(err)
	}
	if err := st.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(st); err != nil {
		t.Fatal(err)
	}
	_ = st.Close()
	if err := s.Retire(); err != nil {
		t.Fatal(err)
	}
	close(retired)
	if n := <-read; n != total {
		t.Errorf("the server read %d bytes, want %d", n, total)
	}
	<-s.Done()
}

func TestFirstBytesTravelWithConnect(t *testing.T) {
	judged := make(chan struct{})
	w := newWorld(t, "127.0.0.1", func(r *hbone.ServerRequest) {
		<-judged
		hbonetest.Echo(r)
	}, nil)
	s := w.connect(t)
	o, err := s.Start(request)
	if err != nil {
		t.Fatal(err)
	}
	if n := o.Send([]byte("GET /"), false); n != 5 {
		t.Errorf("Send took %d bytes", n)
	}
	if n := o.Send([]byte(" HTTP"), true); n != 5 {
		t.Errorf("Send took %d bytes", n)
	}
	close(judged)
	<-o.Settled()
	st, _, err := o.Answer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = st.Close() }()
	if all, err := io.ReadAll(st); string(all) != "GET / HTTP" || err != nil {
		t.Errorf("echo = %q, %v", all, err)
	}
}

// Bytes that were sent and not answered may have been handed on; a lone CONNECT was not.
func TestLostBeforeTheAnswerIsUncertainOnlyWithBytes(t *testing.T) {
	for name, first := range map[string]string{"bytes": "GET /", "none": ""} {
		t.Run(name, func(t *testing.T) {
			asked := make(chan struct{})
			w := newWorld(t, "127.0.0.1", func(r *hbone.ServerRequest) {
				close(asked)
				<-r.Context.Done()
			}, nil)
			s := w.connect(t)
			o, err := s.Start(request)
			if err != nil {
				t.Fatal(err)
			}
			o.Send([]byte(first), false)
			<-asked
			w.server.force()
			_, _, err = o.Answer(t.Context())
			if errors.Is(err, hbone.ErrUncertain) != (first != "") || errors.Is(err, hbone.ErrRefused) != (first == "") {
				t.Errorf("Answer = %v", err)
			}
		})
	}
}

func TestStreamsAreBounded(t *testing.T) {
	w := newWorld(t, "127.0.0.1", hbonetest.Echo, func(c *h3.Config, _ *hbone.ServerConfig) { c.MaxStreams = 3 })
	s := w.connect(t)
	var open []hbone.Stream
	for range 3 {
		st, _, err := hbonetest.Open(t.Context(), s, request)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, st)
	}
	if _, err := s.Start(request); !errors.Is(err, hbone.ErrRefused) {
		t.Errorf("a stream too many: %v, want ErrRefused", err)
	}
	if s.Capacity() != 0 {
		t.Error("a full session has capacity")
	}
	for _, st := range open {
		_ = st.Close()
	}
	for s.Capacity() == 0 { // it forgets that it was full
		time.Sleep(10 * time.Millisecond)
	}
	st, _, err := hbonetest.Open(t.Context(), s, request)
	if err != nil {
		t.Fatal(err)
	}
	_ = st.Close()
}

func TestHandshakesOfOneAddressAreBounded(t *testing.T) {
	var mu sync.Mutex
	refused := 0
	w := newWorld(t, "127.0.0.1", hbonetest.Echo, func(_ *h3.Config, s *hbone.ServerConfig) {
		s.MaxHandshakes = 4 // one for an address
		verify := s.TLS.VerifyConnection
		s.TLS.VerifyConnection = func(state tls.ConnectionState) error {
			time.Sleep(100 * time.Millisecond) // others come meanwhile
			if verify != nil {
				return verify(state)
			}
			return nil
		}
		s.OnHandshakeError = func(_ netip.AddrPort, err error) {
			mu.Lock()
			defer mu.Unlock()
			if errors.Is(err, hbone.ErrTooManyHandshakes) {
				refused++
			}
		}
	})
	var work sync.WaitGroup
	up := make(chan struct{}, 16)
	for range 8 {
		work.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			s, _, err := w.client.endpoint.Connect(ctx, w.key, w.clientTLS)
			if err != nil {
				return
			}
			up <- struct{}{}
			_ = s.Close()
			<-s.Done()
		})
	}
	work.Wait()
	mu.Lock()
	defer mu.Unlock()
	if refused == 0 || len(up) == 0 {
		t.Errorf("%d handshakes were refused, %d succeeded; want some of each", refused, len(up))
	}
}

func TestBudgetBoundsConnections(t *testing.T) {
	budget := &counted{limit: 200 << 10} // two connections' beginnings
	w := newWorld(t, "127.0.0.1", hbonetest.Echo, func(c *h3.Config, _ *hbone.ServerConfig) { c.Budget = budget })
	a, b := w.connect(t), w.connect(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var de *hbone.DialError
	if _, _, err := w.client.endpoint.Connect(ctx, w.key, w.clientTLS); !errors.As(err, &de) {
		t.Errorf("a connection without memory for it: %v, want a DialError", err)
	}
	for _, s := range []hbone.Session{a, b} {
		_ = s.Close()
		<-s.Done()
	}
	for deadline := time.Now().Add(5 * time.Second); budget.taken() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are still reserved", budget.taken())
		}
	}
}

// counted is a budget.
type counted struct {
	mu    sync.Mutex
	limit int
	used  int
}

func (b *counted) Take(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.limit {
		return false
	}
	b.used += n
	return true
}

func (b *counted) Grow(n, _ int) bool { return b.Take(n) }
func (b *counted) Short()             {}

func (b *counted) Give(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
}

func (b *counted) taken() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// However a stream ends, the peer may open another in its place.
func TestEveryEndGivesThePlaceBack(t *testing.T) {
	ends := map[string]func(r *hbone.ServerRequest){
		"unanswered": func(*hbone.ServerRequest) {},
		"rejected":   func(r *hbone.ServerRequest) { r.Reject(503) },
		"served":     hbonetest.Echo,
		"refused": func(r *hbone.ServerRequest) {
			if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
				_ = f.Refuse()
			}
		},
		"closed": func(r *hbone.ServerRequest) {
			if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
				_ = f.Close()
			}
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "127.0.0.1", end, func(c *h3.Config, _ *hbone.ServerConfig) { c.MaxStreams = 2 })
			s := w.connect(t)
			deadline := time.Now().Add(20 * time.Second)
			for done := 0; done < 10; {
				if time.Now().After(deadline) {
					t.Fatalf("no place after %d streams", done)
				}
				var err error
				if name == "refused" || name == "closed" {
					var f hbone.DatagramStream
					if f, _, err = s.OpenDatagrams(t.Context(), request, nil); err == nil {
						_ = f.Close()
					}
				} else {
					var st hbone.Stream
					if st, _, err = hbonetest.Open(t.Context(), s, request); err == nil {
						_ = st.Close()
					}
				}
				if errors.Is(err, hbone.ErrRefused) { // it is not told yet that there is one
					time.Sleep(5 * time.Millisecond)
					continue
				}
				done++
			}
		})
	}
}
