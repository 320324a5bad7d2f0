package proxy

import (
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// said is an application of web that has said text, and ended then, before its connection to
// target was looked at.
func said(t *testing.T, w *world, target netip.AddrPort, text string) *net.TCPConn {
	t.Helper()
	l := w.web.outbound.Addr().(*net.TCPAddr)
	c, err := net.DialTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(w.web.addr, 0)), l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	sendText(t, c, text)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	w.nodes[0].targets.set(addrPort(c.LocalAddr()), target)
	return c
}

func TestFirstBytesAndTheirEndGoToWhoeverServesThem(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	dead := netip.AddrPortFrom(w.db.addr, 1)
	w.publish(func(c *dataplane.Contents) { c.Services = []dataplane.Service{service(w, "db", app, dead)} })
	for range 20 { // the dead one is first in half of them
		c := said(t, w, netip.MustParseAddrPort("10.96.0.1:80"), "hello")
		if all, err := io.ReadAll(c); string(all) != "hello" || err != nil {
			t.Fatalf("echo %q, %v", all, err)
		}
		_ = c.Close()
	}
	eventually(t, "every connection is closed", func() bool { return len(w.nodes[0].events(admin.FlowClose)) == 20 })
	for _, f := range w.nodes[0].events(admin.FlowClose) {
		if f.Sent != 5 || f.Received != 5 {
			t.Errorf("%d bytes sent and %d received, want 5", f.Sent, f.Received)
		}
	}
}

func TestFirstBytesReachNobodyWhoMayNotHaveThem(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, func(c *net.TCPConn) {
		t.Errorf("%v reached the application", c.RemoteAddr())
	})
	w.publish(func(c *dataplane.Contents) { c.Authorizations = []dataplane.AuthorizationPolicy{denyAll("db")} })
	wantReset(t, said(t, w, app, "hello"))
}

// Who has no buffers left gets no first bytes sent, and all of them later.
func TestWithoutBuffersNothingIsReadBeforeTheAnswer(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.PodBuffers = 4 * smallBuffer })
	app := w.listen(w.db.addr, echo)
	s := w.nodes[0].serving("web")[0]
	s.large.used.Store(s.large.limit - smallBuffer + 1)
	first, give := s.firstBytes(nil)
	if first != nil {
		t.Errorf("firstBytes = %v", first)
	}
	give()
	s.large.used.Store(0)
	c := said(t, w, app, "hello")
	if all, err := io.ReadAll(c); string(all) != "hello" || err != nil {
		t.Errorf("echo %q, %v", all, err)
	}
	eventually(t, "what was lent is given back", func() bool { return s.large.used.Load() == 0 })
}
