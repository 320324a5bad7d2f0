package dataplane

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Contents is everything that a Snapshot is made of. NewSnapshot takes it over.
type Contents struct {
	TrustDomain   string
	RootNamespace string // policies here apply to the whole mesh
	// EnrollLabels are further labels that enrol and opt out as ModeLabel does, in the order
	// in which they count when it is absent.
	EnrollLabels []string
	// Stale says that this is the cluster as it was when an earlier agent knew it: pods may
	// have been captured since.
	Stale bool
	// Released says that the mesh is being taken off the cluster: no pod is to be enrolled.
	Released        bool
	Namespaces      []Namespace
	Nodes           []Node
	Workloads       []Workload
	Services        []Service
	Authorizations  []AuthorizationPolicy
	Authentications []PeerAuthentication
	// Captured holds the UIDs of the workloads whose node's agent published them as captured.
	Captured map[string]bool
	// UDP holds the UIDs of those of them that were published as taking UDP.
	UDP map[string]bool
}

// Snapshot is one immutable view of the cluster. All its methods are safe for concurrent
// use, and nothing that they return may be changed.
type Snapshot struct {
	contents   Contents
	namespaces map[string]*Namespace
	nodes      map[string]*Node
	byUID      map[string]*Workload
	byAddr     map[netip.Addr]*Workload
	services   map[Name]*Service
	byVIP      map[netip.Addr]*Service
	byExternal map[netip.AddrPort]*Service
	nodeByAddr map[netip.Addr]*Node
	byNodePort map[uint16]*Service
}

// NewSnapshot indexes c and derives what depends on more than one object: each workload's
// identity, whether it is to be enrolled, and whether it is captured, UDP included.
func NewSnapshot(c Contents) *Snapshot {
	s := &Snapshot{
		contents:   c,
		namespaces: make(map[string]*Namespace, len(c.Namespaces)),
		nodes:      make(map[string]*Node, len(c.Nodes)),
		byUID:      make(map[string]*Workload, len(c.Workloads)),
		byAddr:     make(map[netip.Addr]*Workload, len(c.Workloads)),
		services:   make(map[Name]*Service, len(c.Services)),
		byVIP:      make(map[netip.Addr]*Service, len(c.Services)),
		byExternal: make(map[netip.AddrPort]*Service),
		nodeByAddr: make(map[netip.Addr]*Node, len(c.Nodes)),
		byNodePort: make(map[uint16]*Service),
	}
	slices.SortFunc(c.Workloads, func(a, b Workload) int {
		return cmp.Or(cmp.Compare(a.Name.Namespace, b.Name.Namespace), cmp.Compare(a.Name.Name, b.Name.Name), cmp.Compare(a.UID, b.UID))
	})
	slices.SortFunc(c.Services, func(a, b Service) int {
		return cmp.Or(cmp.Compare(a.Name.Namespace, b.Name.Namespace), cmp.Compare(a.Name.Name, b.Name.Name))
	})
	for i := range c.Namespaces {
		s.namespaces[c.Namespaces[i].Name] = &c.Namespaces[i]
	}
	for i := range c.Nodes {
		s.nodes[c.Nodes[i].Name] = &c.Nodes[i]
		for _, a := range c.Nodes[i].Addrs {
			s.nodeByAddr[a] = &c.Nodes[i]
		}
	}
	for i := range c.Workloads {
		w := &c.Workloads[i]
		w.Identity = spiffe.ID{TrustDomain: c.TrustDomain, Namespace: w.Name.Namespace, ServiceAccount: w.ServiceAccount}
		w.Enrolled = s.wantsCapture(w)
		w.Captured = c.Captured[w.UID] && w.Live() && !w.HostNetwork
		w.UDP = w.Captured && c.UDP[w.UID]
		s.byUID[w.UID] = w
		if w.Live() && !w.HostNetwork {
			s.indexAddrs(w)
		}
	}
	for i := range c.Services {
		svc := &c.Services[i]
		s.services[svc.Name] = svc
		for _, a := range svc.Addrs {
			if s.byVIP[a] == nil {
				s.byVIP[a] = svc
			}
		}
		s.indexExternal(svc)
		for _, p := range svc.Ports {
			if p.NodePort != 0 && s.byNodePort[p.NodePort] == nil {
				s.byNodePort[p.NodePort] = svc
			}
		}
	}
	return s
}

func (s *Snapshot) indexExternal(svc *Service) {
	for _, a := range svc.External {
		for _, p := range svc.Ports {
			if at := netip.AddrPortFrom(a, p.Port); s.byExternal[at] == nil {
				s.byExternal[at] = svc
			}
		}
	}
}

// indexAddrs prefers, for an address that two pods claim, the one that is not on its way out.
func (s *Snapshot) indexAddrs(w *Workload) {
	for _, a := range w.Addrs {
		if other := s.byAddr[a]; other != nil && !other.Terminating {
			continue
		}
		s.byAddr[a] = w
	}
}

func (s *Snapshot) wantsCapture(w *Workload) bool {
	ns := s.namespaces[w.Name.Namespace]
	if s.contents.Released || w.HostNetwork || !w.Live() || ns == nil {
		return false
	}
	return WantsEnrolment(w.Labels, ns.Labels, s.contents.EnrollLabels...)
}

// WantsEnrolment reports what the labels of a pod and of its namespace ask for: the pod's
// own count before its namespace's, and ModeLabel before others.
func WantsEnrolment(pod, namespace map[string]string, others ...string) bool {
	for _, labels := range []map[string]string{pod, namespace} {
		if mode, ok := labels[ModeLabel]; ok {
			return mode == ModeAmbient
		}
		for _, label := range others {
			if mode, ok := labels[label]; ok {
				return mode == ModeAmbient
			}
		}
	}
	return false
}

// TrustDomain is the mesh's own.
func (s *Snapshot) TrustDomain() string { return s.contents.TrustDomain }

// EnrollLabels are the labels that enrol beside ModeLabel.
func (s *Snapshot) EnrollLabels() []string { return s.contents.EnrollLabels }

// Stale says that the cluster has not been asked yet: this is what was known last.
func (s *Snapshot) Stale() bool { return s.contents.Stale }

// Released says that the mesh is being taken off the cluster.
func (s *Snapshot) Released() bool { return s.contents.Released }

// RootNamespace is where mesh-wide policies live.
func (s *Snapshot) RootNamespace() string { return s.contents.RootNamespace }

// Namespace returns nil when there is none of that name.
func (s *Snapshot) Namespace(name string) *Namespace { return s.namespaces[name] }

// Node returns nil when there is none of that name.
func (s *Snapshot) Node(name string) *Node { return s.nodes[name] }

// NodeAt returns the node with that address, or nil.
func (s *Snapshot) NodeAt(a netip.Addr) *Node { return s.nodeByAddr[a] }

// ServiceAtNodePort returns the service that has that port on every node, and the port, or nil.
func (s *Snapshot) ServiceAtNodePort(number uint16) (*Service, ServicePort) {
	svc := s.byNodePort[number]
	if svc == nil {
		return nil, ServicePort{}
	}
	at := slices.IndexFunc(svc.Ports, func(p ServicePort) bool { return p.NodePort == number })
	return svc, svc.Ports[at]
}

// Workload returns nil when no pod has that UID.
func (s *Snapshot) Workload(uid string) *Workload { return s.byUID[uid] }

// WorkloadAt returns the live pod with that address, hostNetwork pods excepted, or nil.
func (s *Snapshot) WorkloadAt(a netip.Addr) *Workload { return s.byAddr[a] }

// WorkloadNamed returns nil when there is no such pod.
func (s *Snapshot) WorkloadNamed(n Name) *Workload {
	for i := range s.contents.Workloads {
		if s.contents.Workloads[i].Name == n {
			return &s.contents.Workloads[i]
		}
	}
	return nil
}

// Service returns nil when there is none of that name.
func (s *Snapshot) Service(n Name) *Service { return s.services[n] }

// ServiceAt returns the service with that cluster IP, or nil. An address that several claim
// belongs to the first of them by namespace and name.
func (s *Snapshot) ServiceAt(a netip.Addr) *Service { return s.byVIP[a] }

// ServiceAtExternal returns the service that has the port at that address outside the
// cluster, or nil; the first by namespace and name of several.
func (s *Snapshot) ServiceAtExternal(at netip.AddrPort) *Service { return s.byExternal[at] }

// InPodCIDR reports whether a lies in some node's pod range.
func (s *Snapshot) InPodCIDR(a netip.Addr) bool {
	for i := range s.contents.Nodes {
		for _, p := range s.contents.Nodes[i].PodCIDRs {
			if p.Contains(a) {
				return true
			}
		}
	}
	return false
}

// Namespaces, Nodes, Workloads (by namespace and name), Services, AuthorizationPolicies
// and PeerAuthentications list all there are.
func (s *Snapshot) Namespaces() []Namespace { return s.contents.Namespaces }

// Nodes lists all nodes.
func (s *Snapshot) Nodes() []Node { return s.contents.Nodes }

// Workloads lists all pods by namespace and name.
func (s *Snapshot) Workloads() []Workload { return s.contents.Workloads }

// Services lists all services.
func (s *Snapshot) Services() []Service { return s.contents.Services }

// AuthorizationPolicies lists all authorization policies.
func (s *Snapshot) AuthorizationPolicies() []AuthorizationPolicy { return s.contents.Authorizations }

// PeerAuthentications lists all peer authentications.
func (s *Snapshot) PeerAuthentications() []PeerAuthentication { return s.contents.Authentications }

// MatchLabels reports whether labels satisfy selector; the empty selector matches all.
func MatchLabels(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
