package enroll

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/raceway-mesh/raceway/dataplane"
)

// cluster is what the test's snapshots are made of.
type cluster struct {
	store dataplane.Store
	pods  map[string]dataplane.Workload
	on    map[string]bool // enrolled, by UID
}

func newCluster(pods ...dataplane.Workload) *cluster {
	c := &cluster{pods: make(map[string]dataplane.Workload), on: make(map[string]bool)}
	for _, p := range pods {
		c.pods[p.UID] = p
		c.on[p.UID] = true
	}
	return c
}

func workload(uid string) dataplane.Workload {
	last := 0
	for _, c := range uid {
		last = last*31 + int(c)
	}
	return dataplane.Workload{
		UID: uid, Name: dataplane.Name{Namespace: "shop", Name: uid}, Node: "n1", Phase: dataplane.PodRunning,
		NetNS: "/run/netns/" + uid, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(last >> 8), byte(last)})},
	}
}

func (c *cluster) publish() {
	contents := dataplane.Contents{TrustDomain: "cluster.local", Namespaces: []dataplane.Namespace{{Name: "shop"}}}
	for uid, p := range c.pods {
		p.Labels = map[string]string{dataplane.ModeLabel: dataplane.ModeNone}
		if c.on[uid] {
			p.Labels[dataplane.ModeLabel] = dataplane.ModeAmbient
		}
		contents.Workloads = append(contents.Workloads, p)
	}
	c.store.Publish(dataplane.NewSnapshot(contents))
}

func (c *cluster) set(uid string, enrolled bool) {
	c.on[uid] = enrolled
	c.publish()
}

// rig is a Reconciler that runs on a fake target in a synctest bubble.
type rig struct {
	*testing.T
	*cluster
	fake *fakeTarget
	r    *Reconciler
	stop func() error
}

func newRig(t *testing.T, c *cluster, change func(*Config)) *rig {
	fake := newFake(t)
	cfg := Config{Node: "n1", Store: &c.store, Target: fake, RequireNetNS: true}
	if change != nil {
		change(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	fake.cfg, fake.status = r.cfg, r.Status
	return &rig{T: t, cluster: c, fake: fake, r: r}
}

func (g *rig) run() {
	g.Helper()
	ctx, cancel := context.WithCancel(g.Context())
	done := make(chan error, 1)
	go func() { done <- g.r.Run(ctx) }()
	g.stop = func() error { cancel(); return <-done }
}

func (g *rig) halt() {
	g.Helper()
	if err := g.stop(); err != nil {
		g.Errorf("Run: %v", err)
	}
}

func (g *rig) expectLog(want ...string) {
	g.Helper()
	synctest.Wait()
	g.fake.mu.Lock()
	defer g.fake.mu.Unlock()
	if !slices.Equal(g.fake.log, want) {
		g.Errorf("calls:\n  %s\nwant:\n  %s", strings.Join(g.fake.log, "\n  "), strings.Join(want, "\n  "))
	}
	g.fake.log = nil
}

func (g *rig) expectState(uid string, state dataplane.CaptureState, reason string) {
	g.Helper()
	synctest.Wait()
	got, ok := g.r.Status()[uid]
	if !ok && state == dataplane.CaptureNone {
		return
	}
	if got.State != state || !strings.Contains(got.Reason, reason) {
		g.Errorf("%s is %v (%s), want %v (…%s…)", uid, got.State, got.Reason, state, reason)
	}
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}
