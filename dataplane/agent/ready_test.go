package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/enroll"
)

// fakeTarget prepares pods as told, and does all else at once.
type fakeTarget struct {
	mu      sync.Mutex
	prepare map[string]error // by UID; a pod that is not in it hangs
}

func (f *fakeTarget) allow(uid string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.prepare[uid] = err
}

func (f *fakeTarget) Prepare(ctx context.Context, w *dataplane.Workload) error {
	for {
		f.mu.Lock()
		err, known := f.prepare[w.UID]
		f.mu.Unlock()
		if known {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (f *fakeTarget) Publish(context.Context, []string) error       { return nil }
func (f *fakeTarget) CaptureOutbound(context.Context, string) error { return nil }
func (f *fakeTarget) CaptureInbound(context.Context, string) error  { return nil }
func (f *fakeTarget) Guard(context.Context, string) error           { return nil }
func (f *fakeTarget) Unguard(context.Context, string) error         { return nil }
func (f *fakeTarget) ReleaseInbound(context.Context, string) error  { return nil }
func (f *fakeTarget) ReleaseOutbound(context.Context, string) error { return nil }
func (f *fakeTarget) Live(string) int                               { return 0 }
func (f *fakeTarget) Remove(context.Context, string) error          { return nil }

// fakeCluster is an API server that may be away, and what it was asked for.
type fakeCluster struct {
	mu       sync.Mutex
	away     error
	untaints int
	marks    int
}

func (f *fakeCluster) Run(context.Context, *dataplane.Store) error { return nil }
func (f *fakeCluster) Problems() []discovery.Problem               { return nil }
func (f *fakeCluster) Stopped(dataplane.Name, string)              {}
func (f *fakeCluster) Staleness() time.Duration                    { return 0 }

func (f *fakeCluster) PublishCaptured(context.Context, []string, []string) error { return nil }

func (f *fakeCluster) Started(context.Context, discovery.Sandbox) (dataplane.Workload, error) {
	return dataplane.Workload{}, nil
}

func (f *fakeCluster) RemoveTaint(context.Context) error  { return f.count(&f.untaints) }
func (f *fakeCluster) MarkReleased(context.Context) error { return f.count(&f.marks) }

func (f *fakeCluster) count(n *int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away == nil {
		*n++
	}
	return f.away
}

func (f *fakeCluster) set(away error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = away
}

func (f *fakeCluster) counts() (untaints, marks int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.untaints, f.marks
}

func wantedPod(uid string) dataplane.Workload {
	return dataplane.Workload{
		UID: uid, Name: dataplane.Name{Namespace: "shop", Name: uid}, Node: "n1", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
		Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}, Phase: dataplane.PodRunning,
	}
}

// becoming is an agent that starts on a node with pods.
type becoming struct {
	*Agent
	target  *fakeTarget
	cluster *fakeCluster
}

func newBecoming(t *testing.T, adopted ...string) *becoming {
	t.Helper()
	b := &becoming{
		Agent:  &Agent{cfg: Config{Node: "n1", StartupTaint: "x", Log: slog.New(slog.DiscardHandler)}},
		target: &fakeTarget{prepare: map[string]error{}}, cluster: new(fakeCluster),
	}
	b.Agent.cluster = b.cluster
	b.ready.set(errNoView)
	var left []enroll.Adopted
	for _, uid := range adopted {
		left = append(left, enroll.Adopted{UID: uid, Published: true})
	}
	var err error
	b.reconciler, err = enroll.New(enroll.Config{Node: "n1", Store: &b.store, Target: b.target, Adopted: left})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var parts sync.WaitGroup
	for _, run := range []func(context.Context) error{b.reconciler.Run, b.becomeReady} {
		parts.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		stop()
		parts.Wait()
	})
	return b
}

func (b *becoming) expect(t *testing.T, why string) {
	t.Helper()
	time.Sleep(time.Second)
	synctest.Wait()
	err := b.ready.get()
	if why == "" && err != nil || why != "" && (err == nil || !strings.Contains(err.Error(), why)) {
		t.Errorf("not ready because of %v, want %q", err, why)
	}
}

func TestReadyOnceThePodsThatWereThereAreServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBecoming(t, "adopted", "gone")
		b.expect(t, "no complete view")
		b.store.Publish(dataplane.NewSnapshot(shop(wantedPod("adopted"), wantedPod("broken"), wantedPod("slow"))))
		b.expect(t, "3 pods of this node are still to be served: adopted, broken, slow")
		b.target.allow("adopted", nil)
		b.target.allow("broken", errors.New("no network namespace"))
		b.expect(t, "1 pods of this node are still to be served: slow")
		b.cluster.set(errors.New("the API server is away"))
		b.store.Publish(dataplane.NewSnapshot(shop(wantedPod("adopted"), wantedPod("broken"), wantedPod("slow"), wantedPod("later"))))
		b.target.allow("slow", nil)
		b.expect(t, "")
		if untaints, _ := b.cluster.counts(); untaints != 0 {
			t.Error("the taint was removed without an API server")
		}
		b.cluster.set(nil)
		time.Sleep(maxBackoff)
		if untaints, _ := b.cluster.counts(); untaints != 1 {
			t.Errorf("the taint was removed %d times", untaints)
		}
	})
}

func TestPodThatCannotBeServedDelaysReadinessForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBecoming(t)
		b.store.Publish(dataplane.NewSnapshot(shop(wantedPod("slow"))))
		b.expect(t, "slow")
		// Its step times out before, which is a reason.
		time.Sleep(takeOver)
		b.expect(t, "")
	})
}

func TestReadyWithoutPodsAndWhileReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBecoming(t, "adopted")
		c := shop(wantedPod("adopted"))
		c.Released = true
		b.store.Publish(dataplane.NewSnapshot(c))
		b.expect(t, "")
	})
	synctest.Test(t, func(t *testing.T) {
		b := newBecoming(t)
		b.store.Publish(dataplane.NewSnapshot(shop()))
		b.expect(t, "")
	})
}

func TestAgentWithoutItsPluginIsNotReady(t *testing.T) {
	r := newPluginRig(t)
	a := &Agent{plugin: r.plugin}
	var err error
	if a.reconciler, err = enroll.New(enroll.Config{Node: "n1", Store: &a.store, Target: new(fakeTarget)}); err != nil {
		t.Fatal(err)
	}
	s := dataplane.NewSnapshot(shop())
	if err := a.unready(s, nil, true); err == nil || !strings.Contains(err.Error(), "CNI plugin is not in place") {
		t.Errorf("ready without it: %v", err)
	}
	r.run()
	defer r.stop()
	r.publish(shop())
	within(t, "ready with it", func() bool { return a.unready(s, nil, true) == nil })
}
