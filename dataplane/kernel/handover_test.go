package kernel_test

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// serveAll accepts what the pod's listeners get, until the listeners are closed.
func serveAll(t *testing.T, p *kernel.Pod, accepted *atomic.Int64) {
	t.Helper()
	for _, l := range []net.Listener{p.Outbound(), p.Inbound(), p.Tunnel()} {
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				accepted.Add(1)
				go func() {
					_, _ = conn.Write([]byte("x")) // what is missing shows at the client
					_, _ = conn.Read(make([]byte, 1))
					_ = conn.Close()
				}()
			}
		}()
	}
}

// knocking is a crowd of clients for which every connection must be accepted.
type knocking struct {
	stop     chan struct{}
	clients  sync.WaitGroup
	count    atomic.Int64
	failures chan error
}

func startKnocking(t *testing.T, f *fixture) *knocking {
	k := &knocking{stop: make(chan struct{}), failures: make(chan error, 100)}
	for _, fam := range families() {
		for _, way := range []struct {
			from *netnstest.Pod
			to   netip.AddrPort
		}{
			{f.web, netip.AddrPortFrom(fam.of(f.db), 3306)},
			{f.db, netip.AddrPortFrom(fam.of(f.web), 8080)},
			{f.db, netip.AddrPortFrom(fam.of(f.web), 15008)},
		} {
			k.clients.Go(func() {
				for {
					select {
					case <-k.stop:
						return
					case <-time.After(time.Millisecond):
					}
					if err := knock(t, way.from, way.to); err != nil {
						select {
						case k.failures <- err:
						default:
						}
					}
					k.count.Add(1)
				}
			})
		}
	}
	return k
}

func knock(t *testing.T, from *netnstest.Pod, to netip.AddrPort) error {
	conn, err := tryDial(t, from.Namespace, to, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	// Nothing of it is to stay in TIME_WAIT, where the next with the same ports would meet it.
	if err := conn.SetLinger(0); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}

// end wants that not one connection failed.
func (k *knocking) end(t *testing.T) {
	t.Helper()
	close(k.stop)
	k.clients.Wait()
	close(k.failures)
	for err := range k.failures {
		t.Errorf("a connection failed: %v", err)
	}
	if n := k.count.Load(); n < 100 {
		t.Errorf("only %d connections were made: too few to prove anything", n)
	}
}

// handOver has another Datapath take f's over, and returns the old one, which still accepts.
func (f *fixture) handOver(t *testing.T, accepted *atomic.Int64) (old *kernel.Datapath) {
	t.Helper()
	old = f.dp
	if err := old.Yield(); err != nil {
		t.Fatal(err)
	}
	f.open(t)
	time.Sleep(50 * time.Millisecond) // the old one serves meanwhile
	f.openPod(t)
	serveAll(t, f.pod, accepted)
	return old
}

// From one agent to the next, and on, whatever their layouts: no connection is refused, what
// the old agents have opened and accepted passes the guards of the new ones.
func TestHandoverRefusesNobody(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		f.enrol(t)
		at := netip.AddrPortFrom(f.db.V4, 3307)
		server := netnstest.Listen(t, f.db.Namespace, "tcp", at.String())
		direct, err := f.pod.DialDirect(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		defer direct.Close()
		peer := accept(t, server)
		client := dial(t, f.db.Namespace, netip.AddrPortFrom(f.web.V6, 15008))
		tunnel := accept(t, f.pod.Tunnel())
		if err := f.pod.Tunnel().SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		use := func() {
			t.Helper()
			send(t, direct, peer, "from an old agent")
			send(t, tunnel, client, "an old agent's answer")
		}
		use()

		first := new(atomic.Int64)
		serveAll(t, f.pod, first)
		k := startKnocking(t, f)
		base := f.cfg
		for _, layout := range []string{"", "", "another", "another", ""} {
			f.cfg = base.WithLayout(layout)
			accepted := new(atomic.Int64)
			old := f.handOver(t, accepted)
			time.Sleep(100 * time.Millisecond)
			use()
			if accepted.Load() == 0 {
				t.Error("the new agent was given no connection")
			}
			// Only sockets that live by themselves are left of the first.
			t.Cleanup(func() {
				if err := old.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		k.end(t)
		use()
		if n := f.counter(t, "guard", "dropped_payload") + f.counter(t, "guard", "dropped_connect"); n != 0 {
			t.Errorf("the guard dropped %d packets", n)
		}
		assertGuarded(t, f)
	})
}

// assertGuarded wants the capture of f's pod to be whole.
func assertGuarded(t *testing.T, f *fixture) {
	t.Helper()
	for _, finding := range f.pod.Check(t.Context()) {
		if !finding.OK {
			t.Errorf("%s: %s", finding.Check, finding.Detail)
		}
	}
}

// A successor that dies leaves nobody without a listener once the old agent knows of it, and
// the next one takes over as ever.
func TestListenersAreReclaimedFromADeadSuccessor(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		for _, layout := range []string{"", "another"} {
			f := newFixture(t, m)
			f.enrol(t)
			accepted := new(atomic.Int64)
			serveAll(t, f.pod, accepted)
			base, old := f.cfg, f.dp
			if err := old.Yield(); err != nil {
				t.Fatal(err)
			}
			f.cfg = base.WithLayout(layout)
			f.open(t)
			f.openPod(t)
			if err := old.Reclaim(); !errors.Is(err, kernel.ErrInUse) {
				t.Errorf("reclaimed from a successor that lives: %v", err)
			}
			if err := f.dp.Close(); err != nil {
				t.Fatal(err)
			}
			at := netip.AddrPortFrom(f.db.V4, 3306)
			if conn, err := tryDial(t, f.web.Namespace, at, patience); err == nil {
				conn.Close()
				t.Error("somebody accepts though the successor is dead")
			}
			if err := old.Reclaim(); err != nil {
				t.Fatal(err)
			}
			for _, fam := range families() {
				if err := knock(t, f.web, netip.AddrPortFrom(fam.of(f.db), 3306)); err != nil {
					t.Errorf("%s: after the listeners were reclaimed: %v", fam.name, err)
				}
			}
			if accepted.Load() == 0 {
				t.Error("the old agent was given no connection")
			}
			k := startKnocking(t, f)
			f.cfg = base
			f.open(t)
			f.openPod(t)
			serveAll(t, f.pod, new(atomic.Int64))
			time.Sleep(200 * time.Millisecond)
			k.end(t)
			assertGuarded(t, f)
			if err := old.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// What an agent does late, after it gave the node away, must not undo what its successor did.
func TestYieldedDatapathChangesNothing(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	old, pod := f.dp, f.pod
	if err := old.Yield(); err != nil {
		t.Fatal(err)
	}
	for name, do := range map[string]func() error{
		"CaptureOutbound": pod.CaptureOutbound,
		"ReleaseInbound":  pod.ReleaseInbound,
		"Guard":           func() error { return pod.Guard(t.Context()) },
		"Unguard":         pod.Unguard,
		"Prune":           pod.Prune,
		"Relisten":        pod.Relisten,
		"Remove":          pod.Remove,
		"RemoveAdopted":   func() error { return old.RemoveAdopted("web") },
		"Unload":          old.Unload,
	} {
		if err := do(); !errors.Is(err, kernel.ErrYielded) {
			t.Errorf("%s: %v, want ErrYielded", name, err)
		}
	}
	if _, err := old.OpenPod(kernel.PodConfig{UID: "db", NetNS: f.db.Path(), Addrs: f.db.Addrs()}); err == nil {
		t.Error("another pod was opened")
	}
	f.open(t)
	f.openPod(t)
	if mended, err := pod.Repair(); err != nil || mended != nil {
		t.Errorf("Repair put %v back, %v", mended, err)
	}
	if err := old.Close(); err != nil {
		t.Error(err)
	}
	assertGuarded(t, f)
	assertCaptured(t, f)
}

func TestProgramsAreLoadableBesideAnAgent(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	if err := kernel.Loadable(); err != nil {
		t.Error(err)
	}
	assertGuarded(t, f)
}
