package handover

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 5 * time.Second

// start runs a listener until the test, or the caller, stops it.
func start(t *testing.T, path string) (l *Listener, stop func()) {
	t.Helper()
	l, err := Listen(path, Agent{Node: "n1", Version: "old", PID: 1, NetNS: 7}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return l, stop
}

func meet(t *testing.T, path string) *Predecessor {
	t.Helper()
	p, err := Meet(path, Agent{Node: "n1", Version: "new", PID: 2, NetNS: 8})
	if err != nil || p == nil {
		t.Fatalf("Meet: %v, %v", p, err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func within(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
	}
}

func open(c <-chan struct{}) bool {
	select {
	case <-c:
		return false
	default:
		return true
	}
}

func TestNodeIsHandedOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, stop := start(t, path)
	p := meet(t, path)
	if p.Version != "old" || p.NetNS != 7 {
		t.Errorf("the predecessor is %+v", p.Agent)
	}
	taken := make(chan error, 1)
	go func() { taken <- p.Take(t.Context()) }()
	s := <-l.Asked()
	if s.Version != "new" || s.NetNS != 8 {
		t.Errorf("the successor is %+v", s.Agent)
	}
	stop() // the socket goes before the node does
	if other, err := Meet(path, Agent{Node: "n1"}); other != nil || err != nil {
		t.Errorf("a socket that is closed led to %v, %v", other, err)
	}
	select {
	case err := <-taken:
		t.Fatalf("taken before it was granted: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := s.Grant(); err != nil {
		t.Fatal(err)
	}
	if err := <-taken; err != nil {
		t.Fatal(err)
	}
	if !open(s.Done()) {
		t.Error("done before it was said")
	}
	for range 2 {
		if err := p.Done(); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "done", s.Done())
	if !open(s.Gone()) || !open(p.Gone()) {
		t.Error("somebody is gone")
	}
	for range 2 {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "the successor's end", s.Gone())
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestPredecessorThatEndsGivesTheNodeAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, stop := start(t, path)
	p := meet(t, path)
	taken := make(chan error, 1)
	go func() { taken <- p.Take(t.Context()) }()
	if err := (<-l.Asked()).Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-taken; err != nil {
		t.Errorf("the node of an agent that is gone: %v", err)
	}
	within(t, "its end", p.Gone())

	other := meet(t, path)
	stop()
	within(t, "the end of one that sends successors away", other.Gone())
	if err := other.Take(t.Context()); err != nil {
		t.Errorf("the node of an agent that is gone: %v", err)
	}
}

func TestNobodyIsThere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if p, err := Meet(path, Agent{}); p != nil || err != nil {
		t.Errorf("no socket: %v, %v", p, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // as a crash leaves it
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if p, err := Meet(path, Agent{}); p != nil || err != nil {
		t.Errorf("a dead socket: %v, %v", p, err)
	}
	start(t, path) // takes its place
	meet(t, path)
}

func TestForeignAgentsAreSentAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, _ := start(t, path)
	if p, err := Meet(path, Agent{Node: "n2"}); p != nil || err == nil || !strings.Contains(err.Error(), "serves node n1") {
		t.Errorf("an agent of another node: %v, %v", p, err)
	}
	raw, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := raw.Write([]byte("{\"step\":\"take\"}\n")); err != nil {
		t.Fatal(err)
	}
	if err := raw.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if answer, err := newWire(raw).receive(patience); err == nil {
		t.Errorf("one that does not say who it is was answered %+v", answer)
	}
	select {
	case s := <-l.Asked():
		t.Errorf("%+v may take the node", s.Agent)
	default:
	}
}
