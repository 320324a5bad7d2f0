package telemetry

import (
	"github.com/raceway-mesh/raceway/dataplane"
)

// unknown is Istio's word for a label without a value.
const unknown = "unknown"

// labels are the values that a connection's series share. Their number is bounded by what
// the cluster has: they come from snapshots and certificates, never from a peer's headers.
type labels struct {
	reporter            string
	source, destination peerLabels
	service             string // host name
	serviceName         string
	serviceNamespace    string
	protocol            string // of the application: tcp or udp
	security            string
}

type peerLabels struct {
	workload, canonicalService, canonicalRevision, namespace string
	principal, app, version, cluster                         string
}

const labelFlags = "response_flags"

const (
	protocolTCP = "tcp"
	protocolUDP = "udp"
)

// labelNames is the order of values, then response_flags.
func labelNames() []string {
	names := []string{"reporter"}
	for _, side := range []string{"source_", "destination_"} {
		for _, name := range []string{
			"workload", "canonical_service", "canonical_revision", "workload_namespace",
			"principal", "app", "version", "cluster",
		} {
			names = append(names, side+name)
		}
	}
	return append(names, "destination_service", "destination_service_name", "destination_service_namespace",
		"request_protocol", "connection_security_policy", labelFlags)
}

// values is in the order of labelNames.
func (l *labels) values(flags Flags) []string {
	values := make([]string, 0, 23)
	values = append(values, l.reporter)
	for _, p := range []*peerLabels{&l.source, &l.destination} {
		values = append(values, p.workload, p.canonicalService, p.canonicalRevision, p.namespace,
			p.principal, p.app, p.version, p.cluster)
	}
	return append(values, l.service, l.serviceName, l.serviceNamespace, l.protocol, l.security, string(flags))
}

func (m *metrics) labels(a *Attempt) labels {
	l := labels{
		reporter: "source", service: unknown, serviceName: unknown, serviceNamespace: unknown,
		source: m.peer(&a.Source), destination: m.peer(&a.Destination),
		protocol: protocolTCP, security: unknown,
	}
	if a.UDP {
		l.protocol = protocolUDP
	}
	if a.Direction == Inbound {
		l.reporter = "destination"
	}
	switch {
	case a.Tunnel.IsValid():
		l.security = "mutual_tls"
	case a.Kernel:
		l.security = "none"
	}
	if a.Service != nil {
		l.service, l.serviceName, l.serviceNamespace = a.Service.Host, a.Service.Name.Name, a.Service.Name.Namespace
	}
	return l
}

func (m *metrics) peer(p *Peer) peerLabels {
	l := unknownPeer()
	if !p.Identity.IsZero() {
		l.principal = p.Identity.String()
	}
	w := p.Workload
	if w == nil {
		return l
	}
	l.workload, l.namespace = workloadName(w), w.Name.Namespace
	l.canonicalService = CanonicalService(w)
	l.canonicalRevision = CanonicalRevision(w)
	l.app = first(w.Labels["app"], l.canonicalService)
	l.version = first(w.Labels["version"], l.canonicalRevision)
	l.cluster = first(w.Cluster, m.cfg.Cluster, unknown)
	return l
}

func unknownPeer() peerLabels {
	return peerLabels{unknown, unknown, unknown, unknown, unknown, unknown, unknown, unknown}
}

// workloadName is the controller's, so that a series outlives the pods of a rollout.
func workloadName(w *dataplane.Workload) string { return first(w.Owner.Name, w.Name.Name) }

// CanonicalService and CanonicalRevision are Istio's canonical service of a workload: from
// its labels, in the order that Istio gives them.
func CanonicalService(w *dataplane.Workload) string {
	return first(w.Labels["service.istio.io/canonical-name"], w.Labels["app.kubernetes.io/name"], w.Labels["app"], workloadName(w))
}

// CanonicalRevision is "latest" for a workload without a label that tells.
func CanonicalRevision(w *dataplane.Workload) string {
	return first(w.Labels["service.istio.io/canonical-revision"], w.Labels["app.kubernetes.io/version"], w.Labels["version"], "latest")
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
