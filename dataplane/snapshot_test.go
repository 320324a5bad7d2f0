package dataplane

import (
	"net/netip"
	"testing"
)

func labels(mode string) map[string]string {
	if mode == "" {
		return nil
	}
	return map[string]string{ModeLabel: mode}
}

func TestEnrolment(t *testing.T) {
	addrs := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	running := Workload{UID: "u", Name: Name{"shop", "web"}, Addrs: addrs, Phase: PodRunning}
	cases := []struct {
		name       string
		namespaces []Namespace
		change     func(*Workload)
		want       bool
	}{
		{"no labels", []Namespace{{Name: "shop"}}, nil, false},
		{"namespace label", []Namespace{{"shop", labels(ModeAmbient)}}, nil, true},
		{"namespace opts out", []Namespace{{"shop", labels(ModeNone)}}, nil, false},
		{"namespace label of another value", []Namespace{{"shop", labels("Ambient")}}, nil, false},
		{"another namespace's label", []Namespace{{"other", labels(ModeAmbient)}, {Name: "shop"}}, nil, false},
		{
			"canary pod in a plain namespace",
			[]Namespace{{Name: "shop"}},
			func(w *Workload) { w.Labels = labels(ModeAmbient) }, true,
		},
		{
			"pod opts out of its namespace",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.Labels = labels(ModeNone) }, false,
		},
		{
			"pod label of another value does not enrol",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.Labels = labels("sidecar") }, false,
		},
		{
			"hostNetwork pod never, not even by its own label",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.HostNetwork, w.Labels = true, labels(ModeAmbient) }, false,
		},
		{
			"succeeded pod",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.Phase = PodSucceeded }, false,
		},
		{
			"failed pod",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.Phase = PodFailed }, false,
		},
		{
			"pod without an address yet",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.Addrs = nil }, false,
		},
		{
			"pending pod with an address",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.Phase = PodPending }, true,
		},
		{
			"terminating pod stays until it is gone",
			[]Namespace{{"shop", labels(ModeAmbient)}},
			func(w *Workload) { w.Terminating = true }, true,
		},
		{"namespace vanished", nil, nil, false},
		{"namespace vanished, canary", nil, func(w *Workload) { w.Labels = labels(ModeAmbient) }, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := running
			if c.change != nil {
				c.change(&w)
			}
			s := NewSnapshot(Contents{Namespaces: c.namespaces, Workloads: []Workload{w}})
			if got := s.Workload("u").Enrolled; got != c.want {
				t.Errorf("enrolled = %v, want %v", got, c.want)
			}
		})
	}
}

func TestCapturedNeedsPublicationAndTraffic(t *testing.T) {
	addrs := []netip.Addr{netip.MustParseAddr("fd00::1")}
	cases := []struct {
		name     string
		workload Workload
		captured map[string]bool
		want     Protocol
	}{
		{"published", Workload{UID: "u", Addrs: addrs, Phase: PodRunning}, map[string]bool{"u": true}, ProtocolHBONE},
		{"not published", Workload{UID: "u", Addrs: addrs, Phase: PodRunning}, nil, ProtocolTCP},
		{"another is", Workload{UID: "u", Addrs: addrs, Phase: PodRunning}, map[string]bool{"v": true}, ProtocolTCP},
		{"finished since", Workload{UID: "u", Addrs: addrs, Phase: PodSucceeded}, map[string]bool{"u": true}, ProtocolTCP},
		{"without address", Workload{UID: "u", Phase: PodRunning}, map[string]bool{"u": true}, ProtocolTCP},
		{"hostNetwork", Workload{UID: "u", Addrs: addrs, Phase: PodRunning, HostNetwork: true}, map[string]bool{"u": true}, ProtocolTCP},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := NewSnapshot(Contents{Workloads: []Workload{c.workload}, Captured: c.captured})
			if got := s.Workload("u").Protocol(); got != c.want {
				t.Errorf("protocol = %v, want %v", got, c.want)
			}
		})
	}
}

func TestIdentityFollowsServiceAccount(t *testing.T) {
	s := NewSnapshot(Contents{
		TrustDomain: "example.org",
		Workloads:   []Workload{{UID: "u", Name: Name{"shop", "web-0"}, ServiceAccount: "web"}},
	})
	if got, want := s.Workload("u").Identity.String(), "spiffe://example.org/ns/shop/sa/web"; got != want {
		t.Errorf("identity = %s, want %s", got, want)
	}
}

func TestAddressClaimedTwice(t *testing.T) {
	a := netip.MustParseAddr("10.0.0.1")
	pod := func(name string, change func(*Workload)) Workload {
		w := Workload{UID: name, Name: Name{"shop", name}, Addrs: []netip.Addr{a}, Phase: PodRunning}
		if change != nil {
			change(&w)
		}
		return w
	}
	terminating := func(w *Workload) { w.Terminating = true }
	cases := []struct {
		name string
		pods []Workload
		want string
	}{
		{"first by name", []Workload{pod("b", nil), pod("a", nil)}, "a"},
		{"a new pod before one on its way out", []Workload{pod("a", terminating), pod("b", nil)}, "b"},
		{"and in the other order of names", []Workload{pod("a", nil), pod("b", terminating)}, "a"},
		{"a finished pod has none", []Workload{pod("a", func(w *Workload) { w.Phase = PodFailed }), pod("b", nil)}, "b"},
		{"a hostNetwork pod has none", []Workload{pod("a", func(w *Workload) { w.HostNetwork = true }), pod("b", nil)}, "b"},
		{"one on its way out while it is the only one", []Workload{pod("a", terminating)}, "a"},
		{"nobody", []Workload{pod("a", func(w *Workload) { w.HostNetwork = true })}, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if w := NewSnapshot(Contents{Workloads: c.pods}).WorkloadAt(a); w != nil {
				got = w.UID
			}
			if got != c.want {
				t.Errorf("the address belongs to %q, want %q", got, c.want)
			}
		})
	}
}

func TestServiceAddressClaimedTwiceBelongsToTheFirstByName(t *testing.T) {
	a := netip.MustParseAddr("10.96.0.1")
	list := []Service{
		{Name: Name{"b", "a"}, Addrs: []netip.Addr{a}},
		{Name: Name{"a", "b"}, Addrs: []netip.Addr{a}},
		{Name: Name{"a", "c"}, Addrs: []netip.Addr{a}},
	}
	if got, want := NewSnapshot(Contents{Services: list}).ServiceAt(a).Name, (Name{"a", "b"}); got != want {
		t.Errorf("service = %v, want %v", got, want)
	}
}

func TestLookups(t *testing.T) {
	s := NewSnapshot(Contents{
		Namespaces: []Namespace{{Name: "shop"}},
		Nodes: []Node{{Name: "n1", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, PodCIDRs: []netip.Prefix{
			netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:1::/64"),
		}}},
		Workloads: []Workload{
			{UID: "1", Name: Name{"shop", "web"}},
			{UID: "2", Name: Name{"lab", "web"}},
		},
		Services: []Service{{Name: Name{"shop", "db"}, Ports: []ServicePort{{Name: "sql", Port: 3306, NodePort: 30306}}}},
	})
	if s.Namespace("shop") == nil || s.Namespace("lab") != nil {
		t.Error("namespaces are mixed up")
	}
	if s.Node("n1") == nil || s.Node("n2") != nil {
		t.Error("nodes are mixed up")
	}
	if w := s.WorkloadNamed(Name{"shop", "web"}); w == nil || w.UID != "1" {
		t.Errorf("shop/web = %+v", w)
	}
	if s.WorkloadNamed(Name{"shop", "db"}) != nil || s.Workload("3") != nil || s.ServiceAt(netip.Addr{}) != nil {
		t.Error("found what is not there")
	}
	if got := s.Workloads()[0].Name.Namespace; got != "lab" {
		t.Errorf("workloads start with namespace %s, want them sorted", got)
	}
	if p, ok := s.Service(Name{"shop", "db"}).Port(3306); !ok || p.Name != "sql" {
		t.Errorf("port 3306 = %+v, %v", p, ok)
	}
	if n := s.NodeAt(netip.MustParseAddr("192.0.2.1")); n == nil || n.Name != "n1" || s.NodeAt(netip.MustParseAddr("192.0.2.2")) != nil {
		t.Errorf("node at 192.0.2.1 = %+v", n)
	}
	if svc, p := s.ServiceAtNodePort(30306); svc == nil || svc.Name.Name != "db" || p.Port != 3306 {
		t.Errorf("service at node port 30306 = %+v %+v", svc, p)
	}
	if svc, _ := s.ServiceAtNodePort(0); svc != nil {
		t.Errorf("a service without a node port is found at 0: %+v", svc)
	}
	if _, ok := s.Service(Name{"shop", "db"}).Port(80); ok {
		t.Error("found port 80")
	}
	for addr, want := range map[string]bool{
		"10.244.1.9": true, "10.244.2.9": false, "fd00:1::9": true, "fd00:2::9": false,
	} {
		if got := s.InPodCIDR(netip.MustParseAddr(addr)); got != want {
			t.Errorf("InPodCIDR(%s) = %v, want %v", addr, got, want)
		}
	}
}

func TestDataPlanePorts(t *testing.T) {
	for port, want := range map[uint16]bool{15001: true, 15006: true, 15008: true, 15020: false, 80: false, 0: false} {
		if got := IsDataPlanePort(port); got != want {
			t.Errorf("IsDataPlanePort(%d) = %v, want %v", port, got, want)
		}
	}
}

func TestCaptureStateIsAWord(t *testing.T) {
	for state, want := range map[CaptureState]string{
		CaptureNone: "none", CapturePending: "pending", CaptureInForce: "captured",
		CaptureFailed: "failed", CaptureReleasing: "releasing",
	} {
		if got, err := state.MarshalText(); err != nil || string(got) != want {
			t.Errorf("state %d = %s, %v, want %s", int(state), got, err, want)
		}
	}
}

func TestLabelsEnrol(t *testing.T) {
	const istio = "istio.io/dataplane-mode"
	set := func(pairs ...string) map[string]string {
		labels := make(map[string]string)
		for i := 0; i < len(pairs); i += 2 {
			labels[pairs[i]] = pairs[i+1]
		}
		return labels
	}
	for _, test := range []struct {
		name           string
		pod, namespace map[string]string
		others         []string
		want           bool
	}{
		{name: "none"},
		{name: "namespace", namespace: set(ModeLabel, ModeAmbient), want: true},
		{name: "pod opts out", pod: set(ModeLabel, ModeNone), namespace: set(ModeLabel, ModeAmbient)},
		{name: "pod alone", pod: set(ModeLabel, ModeAmbient), want: true},
		{name: "a word that is none", pod: set(ModeLabel, "yes"), namespace: set(ModeLabel, ModeAmbient)},
		{name: "another label that nobody named", namespace: set(istio, ModeAmbient)},
		{name: "another label", namespace: set(istio, ModeAmbient), others: []string{istio}, want: true},
		{name: "ours first", namespace: set(istio, ModeAmbient, ModeLabel, ModeNone), others: []string{istio}},
		{name: "the pod before its namespace", pod: set(istio, ModeNone), namespace: set(ModeLabel, ModeAmbient), others: []string{istio}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := WantsEnrolment(test.pod, test.namespace, test.others...); got != test.want {
				t.Errorf("got %t", got)
			}
		})
	}
}

func TestReleasedMeshEnrolsNobody(t *testing.T) {
	for _, released := range []bool{false, true} {
		s := NewSnapshot(Contents{
			Released: released, Namespaces: []Namespace{{Name: "shop", Labels: map[string]string{ModeLabel: ModeAmbient}}},
			Workloads: []Workload{{UID: "1", Name: Name{"shop", "web"}, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Phase: PodRunning}},
		})
		if s.Workload("1").Enrolled == released {
			t.Errorf("released %t: enrolled %t", released, !released)
		}
	}
}
