package kernelpath

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeKernel remembers what it was told, and says what a test has it say.
type fakeKernel struct {
	mu         sync.Mutex
	generation uint64
	allowed    map[ask]kernel.Allowance
	released   map[string]bool
	live       []kernel.DirectConnection
	cut        []kernel.DirectID
	events     chan kernel.DirectConnection
}

func (k *fakeKernel) Direct() error { return nil }

func (k *fakeKernel) InForce(uid string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.released[uid]
}

func (k *fakeKernel) Revoke() (uint64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.generation++
	return k.generation, nil
}

func (k *fakeKernel) Allow(uid string, destination netip.AddrPort, a kernel.Allowance) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.allowed[ask{uid, destination}] = a
	return nil
}

func (k *fakeKernel) Disallow(uid string, destination netip.AddrPort) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.allowed, ask{uid, destination})
	return nil
}

func (k *fakeKernel) FollowDirect(ctx context.Context, fn func(kernel.DirectConnection)) error {
	for {
		select {
		case c := <-k.events:
			fn(c)
		case <-ctx.Done():
			return nil
		}
	}
}

func (k *fakeKernel) DirectConnections() ([]kernel.DirectConnection, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.live, nil
}

func (k *fakeKernel) Cut(id kernel.DirectID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cut = append(k.cut, id)
	return nil
}

// reaches reports how many endpoints web reaches by the kernel, by what holds now.
func (k *fakeKernel) reaches(destination string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	a, ok := k.allowed[ask{"web", netip.MustParseAddrPort(destination)}]
	if !ok || a.Generation != k.generation {
		return 0
	}
	return len(a.Local)
}

func (k *fakeKernel) cuts() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.cut)
}

// rig is Paths at work on a node with pods web and db.
type rig struct {
	*Paths
	t         *testing.T
	kernel    *fakeKernel
	store     dataplane.Store
	telemetry *telemetry.Telemetry
	stop      func()
}

const database = "10.0.0.2:5432"

func contents() dataplane.Contents {
	pod := func(name, addr string) dataplane.Workload {
		return dataplane.Workload{
			UID: name, Name: dataplane.Name{Namespace: "shop", Name: name}, ServiceAccount: name, Node: "n1",
			Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Labels: map[string]string{"app": name}, Phase: dataplane.PodRunning,
		}
	}
	return dataplane.Contents{
		TrustDomain: "cluster.local", RootNamespace: "istio-system", Namespaces: []dataplane.Namespace{{Name: "shop"}},
		Workloads: []dataplane.Workload{pod("web", "10.0.0.1"), pod("db", "10.0.0.2")}, Captured: map[string]bool{"web": true, "db": true},
	}
}

func denying(dryRun bool) dataplane.Contents {
	c := contents()
	c.Authorizations = []dataplane.AuthorizationPolicy{{
		Name: dataplane.Name{Namespace: "shop", Name: "no"}, Action: dataplane.ActionDeny, DryRun: dryRun,
		Selector: map[string]string{"app": "db"}, Rules: []dataplane.PolicyRule{{}},
	}}
	return c
}

func newRig(t *testing.T, live ...kernel.DirectConnection) *rig {
	t.Helper()
	r := &rig{t: t, kernel: &fakeKernel{
		allowed: make(map[ask]kernel.Allowance), released: make(map[string]bool), events: make(chan kernel.DirectConnection), live: live,
	}}
	var err error
	if r.telemetry, err = telemetry.New(telemetry.Config{}); err != nil {
		t.Fatal(err)
	}
	r.Paths, err = New(Config{Node: "n1", Store: &r.store, Kernel: r.kernel, Telemetry: r.telemetry, Interval: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	r.store.Publish(dataplane.NewSnapshot(contents()))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	r.stop = func() { cancel(); running.Wait() }
	t.Cleanup(r.stop)
	r.eventually("it judges", func() bool { return r.now() != nil })
	return r
}

func (r *rig) eventually(what string, holds func() bool) {
	r.t.Helper()
	for end := time.Now().Add(5 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("not within 5s: %s", what)
		}
	}
}

// offer is a connection of web through the proxy.
func (r *rig) offer(destination string) []netip.AddrPort {
	return r.Offer("web", netip.MustParseAddrPort(destination))
}

func event(kind kernel.DirectEvent) kernel.DirectConnection {
	return kernel.DirectConnection{
		Event: kind, Client: "web", Server: "db", From: netip.MustParseAddrPort("10.0.0.1:4000"),
		To: netip.MustParseAddrPort(database), Asked: netip.MustParseAddrPort(database), Arrived: true,
		Started: kernel.Monotonic(), Now: kernel.Monotonic(),
	}
}

// last waits for the record of the end of so many connections, and returns the last one.
func (r *rig) last(n int) admin.Flow {
	r.t.Helper()
	var ends []admin.Flow
	r.eventually("connections end", func() bool {
		ends = nil
		_ = r.telemetry.Flows(r.t.Context(), false, func(f admin.Flow) error {
			if f.Event != admin.FlowOpen && f.Event != admin.FlowUpdate {
				ends = append(ends, f)
			}
			return nil
		})
		return len(ends) >= n
	})
	if len(ends) != n {
		r.t.Errorf("%d ends were told, want %d: %+v", len(ends), n, ends)
	}
	return ends[len(ends)-1]
}

func TestVerdictsFollowTheSnapshot(t *testing.T) {
	r := newRig(t)
	if left := r.offer(database); left != nil || r.kernel.reaches(database) != 1 {
		t.Errorf("the first connection leaves %v, and the kernel reaches %d", left, r.kernel.reaches(database))
	}
	if left := r.offer(database); len(left) != 1 {
		t.Errorf("the second one leaves %v to the kernel", left)
	}
	r.offer("192.0.2.9:80")
	if n := r.kernel.reaches("192.0.2.9:80"); n != 0 {
		t.Error("a destination outside is allowed")
	}
	// Publish returns when the old verdict holds no more, not when it is replaced.
	r.store.Publish(dataplane.NewSnapshot(denying(false)))
	if r.kernel.reaches(database) != 0 {
		t.Error("a verdict outlives the snapshot that it was made by")
	}
	if left := r.offer(database); left != nil {
		t.Errorf("what is denied leaves %v to the kernel", left)
	}
	r.store.Publish(dataplane.NewSnapshot(contents()))
	r.offer(database)
	r.store.Publish(dataplane.NewSnapshot(contents()))
	r.eventually("a verdict that is in use is renewed", func() bool { return r.kernel.reaches(database) == 1 })
	r.stop()
	if r.kernel.reaches(database) != 0 || r.offer(database) != nil {
		t.Error("a verdict outlives who keeps it")
	}
}

func TestUnansweredConnectionsTakeTheTunnel(t *testing.T) {
	r := newRig(t)
	r.offer(database)
	c := event(kernel.DirectUnanswered)
	c.Arrived = false
	r.kernel.events <- c
	r.eventually("the way is blocked", func() bool { return r.kernel.reaches(database) == 0 })
	if r.offer(database); r.kernel.reaches(database) != 0 {
		t.Error("it is tried again at once")
	}
}

// Nothing of it passes the guards, so that it would hang.
func TestTranslatedConnectionsAreCut(t *testing.T) {
	r := newRig(t)
	c := event(kernel.DirectOpened)
	c.Arrived = false
	r.kernel.events <- c
	r.eventually("it is cut", func() bool { return r.kernel.cuts() == 1 })
	r.kernel.events <- event(kernel.DirectClosed)
	if end := r.last(2); end.Flags != string(telemetry.FlagsConnect) || !strings.Contains(end.Cause, "NAT") {
		t.Errorf("its end is %+v", end)
	}
}

func TestBothEndsAreTold(t *testing.T) {
	r := newRig(t)
	r.kernel.events <- event(kernel.DirectOpened)
	r.eventually("both ends are live", func() bool { return len(r.telemetry.Connections()) == 2 })
	for _, c := range r.telemetry.Connections() {
		if c.Protocol != dataplane.ProtocolKernel || c.Source.Identity.ServiceAccount != "web" || c.Destination.Identity.ServiceAccount != "db" {
			t.Errorf("a live connection is %+v", c)
		}
	}
	end := event(kernel.DirectClosed)
	end.Sent, end.Received, end.Clean = 5, 7, true
	r.kernel.events <- end
	if f := r.last(2); f.Flags != "-" || f.Sent != 5 || f.Received != 7 {
		t.Errorf("the end is %+v", f)
	}
}

func TestEndsAreToldAsTheyWere(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*kernel.DirectConnection)
		flags  telemetry.Flags
		cause  string
		ends   int
	}{
		"reset":             {func(c *kernel.DirectConnection) { c.Err = syscall.ECONNRESET }, telemetry.FlagsReset, "connection reset", 2},
		"broken off":        {func(*kernel.DirectConnection) {}, telemetry.FlagsReset, "before both ends", 2},
		"refused":           {func(c *kernel.DirectConnection) { c.Event, c.Err = kernel.DirectFailed, syscall.ECONNREFUSED }, telemetry.FlagsConnect, "refused", 2},
		"nobody was there":  {func(c *kernel.DirectConnection) { c.Event, c.Arrived = kernel.DirectFailed, false }, telemetry.FlagsConnect, "given up", 1},
		"opening not heard": {func(c *kernel.DirectConnection) { c.Clean = true }, telemetry.FlagsNone, "both ends", 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			c := event(kernel.DirectClosed)
			test.change(&c)
			r.kernel.events <- c
			if f := r.last(test.ends); f.Flags != string(test.flags) || !strings.Contains(f.Cause, test.cause) {
				t.Errorf("flags %q, cause %q; want %q, %q", f.Flags, f.Cause, test.flags, test.cause)
			}
		})
	}
}

func TestPolicyCutsWhatItDenies(t *testing.T) {
	r := newRig(t)
	r.kernel.events <- event(kernel.DirectOpened)
	r.eventually("it is live", func() bool { return r.telemetry.Live() == 2 })
	no := dataplane.Name{Namespace: "shop", Name: "no"}
	r.store.Publish(dataplane.NewSnapshot(denying(true)))
	r.eventually("the dry run is counted", func() bool { return r.telemetry.PolicyCounts("AuthorizationPolicy", no, true).Denied == 1 })
	if r.kernel.cuts() != 0 {
		t.Error("a dry run cuts")
	}
	r.store.Publish(dataplane.NewSnapshot(denying(false)))
	r.eventually("it is cut", func() bool { return r.kernel.cuts() == 1 })
	end := event(kernel.DirectClosed)
	end.Err = errors.New("aborted")
	r.kernel.events <- end
	if f := r.last(2); f.Flags != "DENY" || !strings.HasPrefix(f.Cause, "policy changed: shop/no rule 0") {
		t.Errorf("the end is %+v", f)
	}
	// One that got by while the policy changed is found when it opens.
	r.kernel.events <- event(kernel.DirectOpened)
	r.eventually("the late one is cut", func() bool { return r.kernel.cuts() == 2 })
}

func TestConnectionsOfReleasedPodsGoOn(t *testing.T) {
	r := newRig(t)
	r.kernel.events <- event(kernel.DirectOpened)
	r.eventually("it is live", func() bool { return r.telemetry.Live() == 2 })
	r.kernel.mu.Lock()
	r.kernel.released["db"] = true
	r.kernel.mu.Unlock()
	r.store.Publish(dataplane.NewSnapshot(denying(false)))
	r.kernel.events <- event(kernel.DirectOpened) // what it looked at before this, it has looked at
	time.Sleep(20 * time.Millisecond)
	if r.kernel.cuts() != 0 {
		t.Error("a connection to a pod that is not captured any more was cut")
	}
}

func TestLostEventsAreMadeUpFor(t *testing.T) {
	lost := event(kernel.DirectLive)
	lost.Sent, lost.Started = 9, lost.Now-time.Hour
	r := newRig(t)
	r.kernel.mu.Lock()
	r.kernel.live = []kernel.DirectConnection{lost}
	r.kernel.mu.Unlock()
	r.eventually("a connection whose opening was lost is found", func() bool {
		c := r.telemetry.Connections()
		return len(c) == 2 && c[0].Sent == 9
	})
	r.kernel.mu.Lock()
	r.kernel.live = nil
	r.kernel.mu.Unlock()
	if f := r.last(2); f.Flags != string(telemetry.FlagsUnknown) {
		t.Errorf("an end that was lost is %+v", f)
	}
}

func TestConnectionsAreHandedOver(t *testing.T) {
	live := event(kernel.DirectLive)
	live.Sent = 100
	r := newRig(t, live)
	r.eventually("an earlier agent's connection is found", func() bool {
		c := r.telemetry.Connections()
		return len(c) == 2 && c[0].Sent == 100
	})
	r.stop()
	if r.telemetry.Live() != 0 {
		t.Error("it is not left to the next agent")
	}
	_ = r.telemetry.Flows(t.Context(), false, func(f admin.Flow) error {
		if f.Event == admin.FlowClose {
			t.Errorf("its end is told: %+v", f)
		}
		return nil
	})
}
