package telemetry

import (
	"net/netip"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// parties is what connections between the same two ends have in common, made once for all
// of them.
type parties struct {
	direction           Direction
	source, destination party
	service             string // host name
	policy              string
	kernel, udp         bool
	series              *series
}

type party struct {
	workload, namespace string
	identity            spiffe.ID
	principal           string // identity's text
}

// partiesKey has pointers into the snapshot that the connection was routed by: a workload
// whose labels change is another one.
type partiesKey struct {
	direction                     Direction
	source, destination           *dataplane.Workload
	sourceIdentity, destinationID spiffe.ID
	service                       *dataplane.Service
	policy                        string
	tunnelled, kernel, udp        bool
}

func (a *Attempt) key() partiesKey {
	return partiesKey{
		direction: a.Direction, source: a.Source.Workload, destination: a.Destination.Workload,
		sourceIdentity: a.Source.Identity, destinationID: a.Destination.Identity,
		service: a.Service, policy: a.Policy, tunnelled: a.Tunnel.IsValid(), kernel: a.Kernel, udp: a.UDP,
	}
}

func newParties(a *Attempt, s *series) *parties {
	p := &parties{direction: a.Direction, source: a.Source.party(), destination: a.Destination.party(), policy: a.Policy, kernel: a.Kernel, udp: a.UDP, series: s}
	if a.Service != nil {
		p.service = a.Service.Host
	}
	return p
}

func (p *Peer) party() party {
	out := party{identity: p.Identity, principal: p.Identity.String()}
	if p.Workload != nil {
		out.workload, out.namespace = p.Workload.Name.Name, p.Workload.Name.Namespace
	}
	return out
}

func (p *party) peer(addr netip.AddrPort) admin.Peer {
	return admin.Peer{Addr: addr, Workload: p.workload, Namespace: p.namespace, Identity: p.identity}
}

// maxParties bounds what is remembered between two snapshots: half a kilobyte each.
const maxParties = 4096

// with runs count on what a has in common with other connections. The series stays until
// count has returned.
func (m *metrics) with(a *Attempt, count func(*series)) *parties {
	key := a.key()
	m.mu.RLock()
	p := m.parties[key]
	if p != nil {
		count(p.series)
	}
	m.mu.RUnlock()
	if p != nil {
		return p
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if p = m.parties[key]; p == nil {
		p = newParties(a, m.seriesLocked(m.labels(a)))
		if len(m.parties) >= maxParties {
			clear(m.parties)
		}
		m.parties[key] = p
	}
	count(p.series)
	return p
}

// forgetParties lets go of the snapshot that they point into.
func (m *metrics) forgetParties() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.parties)
}
