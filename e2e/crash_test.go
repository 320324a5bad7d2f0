package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// An agent is killed while its pods open connections, each with a message of its own, and
// transfer data, and while a process in the pod tries to get past the mesh. Meanwhile
// connections are refused and nothing of an enrolled pod crosses the link in clear; a
// transfer under way ends with a reset at both ends; a new agent takes over what the old
// one left.
func TestKilledAgentFailsClosedAndComesBack(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		k := newKill(t, opts, true)
		for _, n := range k.Nodes() {
			k.killAndRestart(n)
		}
		if found := k.stopAndSearch(); found {
			t.Error("a message of an enrolled pod crossed the link in clear")
		}
		if err := k.older.use(); err != nil {
			t.Error("a connection older than the enrolment did not live on:", err)
		}
	})
}

// The same without the guard: what escapes is seen, so the test above can fail.
func TestKilledAgentWithoutGuardLeaks(t *testing.T) {
	k := newKill(t, lab.Options{}, false)
	k.killAndRestart(k.Node(1))
	if found := k.stopAndSearch(); !found {
		t.Error("nothing escaped though nothing guards: the search proves nothing")
	}
}

// kill is two pods on two nodes under load.
type kill struct {
	*cluster
	client, server *lab.Pod
	target         netip.AddrPort
	older          steady
	link           *lab.Capture
	traffic        *load
	stopEscapes    func()
	guarded        bool
}

func newKill(t *testing.T, opts lab.Options, guarded bool) *kill {
	c := newCluster(t, opts)
	k := &kill{cluster: c, client: c.pod("web", 1), server: c.pod("db", 2), guarded: guarded}
	k.target = k.server.AddrPort(3306)
	serve(t, k.server, k.target.Port(), echo)
	c.start("--disable-guard=" + strconv.FormatBool(!guarded))
	k.older = open(t, k.client, k.target)
	c.label(dataplane.ModeAmbient)

	link, err := c.Capture(t.Context(), c.Node(1))
	if err != nil {
		t.Fatal(err)
	}
	k.link = link
	k.traffic = startLoad(t, 4, k.client, k.target)
	k.stopEscapes = startEscapes(t, c, k.client, k.target)
	return k
}

// killAndRestart kills the agent of n and follows what becomes of its pods.
func (k *kill) killAndRestart(n *lab.Node) {
	t := k.t
	t.Helper()
	pins := k.Pins()
	client, served := k.halfTransfer()
	time.Sleep(300 * time.Millisecond) // some connections before the kill
	if err := k.Agent(n).Kill(); err != nil {
		t.Fatal(err)
	}
	wantReset(t, n.Name+" killed, at the client", client)
	wantReset(t, n.Name+" killed, at the application", served)
	for range 20 {
		err := ask(t.Context(), k.client, k.target, nonce())
		if !isReset(err) {
			t.Fatalf("%s: without its agent a connection got %v, want it refused or reset", n.Name, err)
		}
	}
	started := time.Now()
	if _, err := k.Agent(n).Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := k.awaitConnection()
	t.Logf("%s: connections work %v after the restart began", n.Name, back.Sub(started).Round(time.Millisecond))
	k.await(dataplane.CaptureInForce)
	if err := k.Agent(n).AwaitSuccession(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k.guarded {
		checkAgent(t, k.Agent(n))
	}
	if now := k.Pins(); len(now) != len(pins) {
		t.Errorf("%s: %d objects were pinned before the kill, %d after the restart: %v", n.Name, len(pins), len(now), now)
	}
}

// halfTransfer returns the two ends of a connection in the middle of a transfer.
func (k *kill) halfTransfer() (client, served *net.TCPConn) {
	t := k.t
	t.Helper()
	l, err := k.server.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	client = open(t, k.client, k.server.AddrPort(port)).TCPConn
	half := []byte("half a transfer")
	if _, err := client.Write(half); err != nil {
		t.Fatal(err)
	}
	if served, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { served.Close() })
	if _, err := io.ReadFull(served, make([]byte, len(half))); err != nil {
		t.Fatal("read at the application:", err)
	}
	return client, served
}

// awaitConnection tries until a connection works, and returns when it did.
func (k *kill) awaitConnection() time.Time {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), 30*time.Second)
	defer cancel()
	for {
		err := ask(ctx, k.client, k.target, nonce())
		if err == nil {
			return time.Now()
		}
		if ctx.Err() != nil {
			k.t.Fatal("no connection works after the restart:", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// stopAndSearch ends the load and searches every packet that crossed the link for it.
func (k *kill) stopAndSearch() (found bool) {
	t := k.t
	t.Helper()
	k.stopEscapes()
	for _, err := range k.traffic.stop() {
		if strings.Contains(err.Error(), "differ") {
			t.Error(err)
		}
	}
	if n := k.traffic.count.Load(); n < 100 {
		t.Errorf("only %d messages were sent: too few to prove anything", n)
	}
	dropped, err := k.link.Dropped(t.Context())
	if err != nil || dropped != 0 {
		t.Fatalf("the capture missed %d packets (%v): it proves nothing", dropped, err)
	}
	found, err = k.link.Contains(t.Context(), noncePrefix)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// wantReset waits for the end of conn, which must not look clean.
func wantReset(t *testing.T, who string, conn *net.TCPConn) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: read %d bytes and %v, want a reset", who, n, err)
	}
}

// checkAgent wants every finding of `raceway check` to be good.
func checkAgent(t *testing.T, a *lab.Agent) {
	t.Helper()
	client := a.Client()
	defer client.Close()
	findings, err := client.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		if !f.OK {
			t.Errorf("check of %s: %s: %s: %s", a.Node.Name, f.Subject, f.Check, f.Detail)
		}
	}
}
