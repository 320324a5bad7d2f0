package lab_test

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

// watch reads the lab's directory as an agent does, until the test ends.
func watch(t *testing.T, l *lab.Lab) *dataplane.Store {
	t.Helper()
	source, err := file.New(file.Config{Dir: l.ClusterDir(), StatusDir: l.StatusDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	store := new(dataplane.Store)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- source.Run(ctx, store) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("watch the cluster: %v", err)
		}
		for _, p := range source.Problems() {
			t.Errorf("problem in the cluster directory: %+v", p)
		}
	})
	return store
}

// eventually waits until a snapshot satisfies want.
func eventually(t *testing.T, store *dataplane.Store, what string, want func(*dataplane.Snapshot) bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		snapshot, changed := store.Load()
		if snapshot != nil && want(snapshot) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestClusterDirectoryDescribesTheLab(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := labtest.New(t, f.opts)
			store := watch(t, l)
			web, err := l.AddPod(lab.PodSpec{Namespace: "shop", Name: "web-5d9c7b6f48-abcde", Deployment: "web", Node: 2, ServiceAccount: "web-sa"})
			if err != nil {
				t.Fatal(err)
			}
			onNode, err := l.AddPod(lab.PodSpec{Namespace: "shop", Name: "exporter", HostNetwork: true})
			if err != nil {
				t.Fatal(err)
			}
			svc, err := l.AddService(lab.ServiceSpec{
				Namespace: "shop", Name: "web", Ports: []lab.ServicePort{{Port: 80, Target: 8080}},
				InternalTraffic: dataplane.TrafficLocal, Distribution: dataplane.PreferClose,
			})
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, store, "pods and service", func(s *dataplane.Snapshot) bool {
				return len(s.Workloads()) == 2 && s.Service(dataplane.Name{Namespace: "shop", Name: "web"}) != nil
			})
			s, _ := store.Load()
			checkWorkload(t, s, web, svc)
			if w := s.Workload(onNode.UID); w == nil || !w.HostNetwork {
				t.Errorf("hostNetwork pod is %+v", w)
			}
			for _, n := range l.Nodes() {
				node := s.Node(n.Name)
				if node == nil || !slices.Equal(node.PodCIDRs, n.PodCIDRs) || node.Zone != n.Zone || node.Region != n.Region {
					t.Errorf("%s is %+v", n.Name, node)
				}
			}
		})
	}
}

func checkWorkload(t *testing.T, s *dataplane.Snapshot, p *lab.Pod, svc *lab.Service) {
	t.Helper()
	w := s.Workload(p.UID)
	if w == nil {
		t.Fatalf("%s is unknown", p)
	}
	if !slices.Equal(w.Addrs, p.Addrs) || w.NetNS != p.NetNS() || w.Node != p.Node.Name || w.ServiceAccount != p.ServiceAccount ||
		!w.Ready || !w.Live() || w.Owner != (dataplane.Owner{Kind: "Deployment", Name: p.Deployment}) {
		t.Errorf("workload is %+v, pod %+v", w, p)
	}
	got := s.Service(dataplane.Name{Namespace: svc.Namespace, Name: svc.Name})
	if !slices.Equal(got.Addrs, svc.VIPs) || got.InternalTraffic != svc.InternalTraffic || got.Distribution != svc.Distribution {
		t.Errorf("service is %+v, want %+v", got, svc)
	}
	var endpoints []netip.Addr
	for _, e := range got.Endpoints {
		if e.WorkloadUID != p.UID || !e.Ready || e.Node != p.Node.Name || e.Ports[svc.Ports[0].Name] != 8080 {
			t.Errorf("endpoint is %+v", e)
		}
		endpoints = append(endpoints, e.Addr)
	}
	slices.SortFunc(endpoints, netip.Addr.Compare)
	want := slices.SortedFunc(slices.Values(p.Addrs), netip.Addr.Compare)
	if !slices.Equal(endpoints, want) {
		t.Errorf("endpoints are %v, want %v", endpoints, want)
	}
}

func TestClusterDirectoryFollowsEdits(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	store := watch(t, l)
	web, canary := addPod(t, l, "web", 1), addPod(t, l, "canary", 2)
	if err := l.SetPodLabel(canary, "app", "web"); err != nil {
		t.Fatal(err)
	}
	svc, err := l.AddService(lab.ServiceSpec{Namespace: "shop", Name: "web", Ports: []lab.ServicePort{{Port: 80}}})
	if err != nil {
		t.Fatal(err)
	}
	ready := func(s *dataplane.Snapshot) int {
		n := 0
		if service := s.Service(dataplane.Name{Namespace: "shop", Name: "web"}); service != nil {
			for _, e := range service.Endpoints {
				if e.Ready {
					n++
				}
			}
		}
		return n
	}
	enrolled := func(p *lab.Pod) func(*dataplane.Snapshot) bool {
		return func(s *dataplane.Snapshot) bool { w := s.Workload(p.UID); return w != nil && w.Enrolled }
	}
	for _, step := range []struct {
		name string
		edit func() error
		want func(*dataplane.Snapshot) bool
	}{
		{"both behind the service", func() error { return nil }, func(s *dataplane.Snapshot) bool { return ready(s) == 2 }},
		{"namespace enrolled", func() error { return l.LabelNamespace("shop", dataplane.ModeAmbient) }, func(s *dataplane.Snapshot) bool { return enrolled(web)(s) && enrolled(canary)(s) }},
		{"pod opted out", func() error { return l.LabelPod(web, dataplane.ModeNone) }, func(s *dataplane.Snapshot) bool { return !enrolled(web)(s) && enrolled(canary)(s) }},
		{"namespace released", func() error { return l.LabelNamespace("shop", "") }, func(s *dataplane.Snapshot) bool { return !enrolled(canary)(s) }},
		{"pod opted in", func() error { return l.LabelPod(web, dataplane.ModeAmbient) }, enrolled(web)},
		{"one not ready", func() error { return l.SetPodReady(web, false) }, func(s *dataplane.Snapshot) bool { return ready(s) == 1 }},
		{"policy applied", func() error { return l.ApplyFile("policy.yaml", denyAll) }, func(s *dataplane.Snapshot) bool { return len(s.AuthorizationPolicies()) == 1 }},
		{"policy deleted", func() error { return l.DeleteFile("policy.yaml") }, func(s *dataplane.Snapshot) bool { return len(s.AuthorizationPolicies()) == 0 }},
		{"pod removed", func() error { return l.RemovePod(canary) }, func(s *dataplane.Snapshot) bool { return ready(s) == 0 && s.Workload(canary.UID) == nil }},
		{"service removed", func() error { return l.RemoveService(svc) }, func(s *dataplane.Snapshot) bool { return len(s.Services()) == 0 }},
	} {
		if err := step.edit(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		eventually(t, store, step.name, step.want)
	}
	if left := strings.Join(l.Leftovers(), "\n"); strings.Contains(left, "shop.canary") || !strings.Contains(left, "shop.web") {
		t.Errorf("after removing canary there are:\n%s", left)
	}
	if err := l.VanishPod(web); err != nil {
		t.Fatal(err)
	}
	if s, _ := store.Load(); s.Workload(web.UID) == nil || strings.Contains(strings.Join(l.Leftovers(), "\n"), "shop.web") {
		t.Error("a vanished pod must lose its namespace and keep its YAML")
	}
}

const denyAll = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-all, namespace: shop}
spec: {}
`

func TestMistakesInALabsOptionsAreErrors(t *testing.T) {
	for _, opts := range []lab.Options{
		{Name: "much-too-long-for-a-lab"},
		{Name: "a/b"},
		{Nodes: 251},
		{Nodes: -1},
	} {
		if l, err := lab.New(t.Context(), opts); err == nil {
			t.Errorf("made %s of %+v: %v", l.Name(), opts, l.Close())
		}
	}
	l := labtest.New(t, lab.Options{})
	serveEcho(t, addPod(t, l, "web", 1).Host)
	for name, err := range map[string]error{
		"a pod's name taken":   second(l.AddPod(lab.PodSpec{Namespace: "shop", Name: "web"})),
		"no such node":         second(l.AddPod(lab.PodSpec{Namespace: "shop", Name: "other", Node: 3})),
		"service without port": second(l.AddService(lab.ServiceSpec{Namespace: "shop", Name: "web"})),
		"a file elsewhere":     l.ApplyFile("../x.yaml", ""),
		"agent without CA":     second(l.StartAgent(t.Context(), l.Node(1))),
		"the lab's name taken": second(lab.New(t.Context(), lab.Options{Name: l.Name()})),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if answer, _ := ask(t, l.Control(), l.Pods()[0].AddrPort(7), []byte("still")); string(answer) != "still" {
		t.Errorf("after the mistakes the pod answers %q", answer)
	}
}

func TestAProcessThatDoesNotGetReadyIsShownWithItsLog(t *testing.T) {
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "raceway-ca"), []byte("#!/bin/sh\necho no key >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	l := labtest.New(t, lab.Options{BinDir: bin})
	start := time.Now()
	_, err := l.StartCA(t.Context())
	if err == nil || !strings.Contains(err.Error(), "no key") || time.Since(start) > 10*time.Second {
		t.Errorf("after %v: %v, want the log's end at once", time.Since(start), err)
	}
}

func second[T any](_ T, err error) error { return err }
