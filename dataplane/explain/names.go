package explain

import (
	"cmp"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// kindOf reads what people type for a kind. A service is a destination only.
func kindOf(typed string) (kind string, ok bool) {
	switch strings.ToLower(typed) {
	case "pod", "pods", "po":
		return kindPod, true
	case "service", "services", "svc":
		return kindService, true
	case "deploy", "deployment", "deployments":
		return "Deployment", true
	case "sts", "statefulset", "statefulsets":
		return "StatefulSet", true
	case "ds", "daemonset", "daemonsets":
		return "DaemonSet", true
	case "rs", "replicaset", "replicasets":
		return "ReplicaSet", true
	case "job", "jobs":
		return "Job", true
	case "cj", "cronjob", "cronjobs":
		return "CronJob", true
	}
	return "", false
}

const (
	kindPod     = "Pod"
	kindService = "Service"
)

// maxReference is namespace/kind/name at their longest: 63, 253 and a kind's.
const maxReference = 63 + 1 + 20 + 1 + 253

// reference is a name as typed: kind and namespace may be absent.
type reference struct {
	namespace, kind, name string
}

func parseReference(s string) (reference, error) {
	if len(s) > maxReference {
		return reference{}, admin.Invalid(fmt.Sprintf("a name of %d bytes is longer than any that Kubernetes has", len(s)))
	}
	part := strings.Split(s, "/")
	if slices.Contains(part, "") {
		return reference{}, admin.Invalid(fmt.Sprintf("%q is not a name, namespace/name, kind/name or namespace/kind/name", s))
	}
	switch len(part) {
	case 1:
		return reference{name: part[0]}, nil
	case 2:
		if kind, ok := kindOf(part[0]); ok {
			return reference{kind: kind, name: part[1]}, nil
		}
		return reference{namespace: part[0], name: part[1]}, nil
	case 3:
		if kind, ok := kindOf(part[1]); ok {
			return reference{namespace: part[0], kind: kind, name: part[2]}, nil
		}
	}
	return reference{}, admin.Invalid(fmt.Sprintf("%q is not a name, namespace/name, kind/name or namespace/kind/name", s))
}

// source finds the pod that Source names.
func (q *Question) source() (*dataplane.Workload, error) {
	if q.Source == "" {
		return nil, admin.Invalid("the source is empty: name a pod")
	}
	if addr, err := netip.ParseAddr(q.Source); err == nil {
		if w := q.Snapshot.WorkloadAt(addr.Unmap()); w != nil {
			return w, nil
		}
		return nil, &admin.Error{Status: http.StatusNotFound, Message: "no pod has the address " + q.Source, Candidates: q.candidates("", "", false)}
	}
	ref, err := parseReference(q.Source)
	if err != nil {
		return nil, err
	}
	if ref.kind == kindService {
		return nil, admin.Invalid("the source " + q.Source + " is a service: name a pod or its owner, such as deploy/" + ref.name)
	}
	ref.namespace = cmp.Or(ref.namespace, q.From)
	w, err := q.pod(ref, q.Source)
	if err != nil {
		return nil, err
	}
	if w == nil {
		return nil, q.unknown("pod", ref, false)
	}
	return w, nil
}

// pod finds the pod that ref names, itself or by its owner; nil when there is none.
func (q *Question) pod(ref reference, typed string) (*dataplane.Workload, error) {
	var named, owned []*dataplane.Workload
	for i := range q.Snapshot.Workloads() {
		w := &q.Snapshot.Workloads()[i]
		if ref.namespace != "" && w.Name.Namespace != ref.namespace {
			continue
		}
		if w.Name.Name == ref.name && (ref.kind == "" || ref.kind == kindPod) {
			named = append(named, w)
		}
		if w.Owner.Name == ref.name && (ref.kind == "" || ref.kind == w.Owner.Kind) && w.Live() {
			owned = append(owned, w)
		}
	}
	found, describe := named, func(w *dataplane.Workload) string { return w.Name.String() }
	if len(named) == 0 {
		found, describe = owned, ownerName
	}
	if len(found) == 0 {
		return nil, nil
	}
	// Several pods of one name in one namespace are a pod and its successor.
	var names []string
	for _, w := range found {
		if name := describe(w); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) > 1 {
		return nil, &admin.Error{Status: http.StatusConflict, Message: typed + " is ambiguous", Candidates: names}
	}
	w := q.best(found)
	if !w.Live() {
		return nil, &admin.Error{Status: http.StatusNotFound, Message: fmt.Sprintf("pod %s has no traffic: it is %s and has %d addresses", w.Name, orElse(string(w.Phase), "without a phase"), len(w.Addrs))}
	}
	return w, nil
}

// ownerName is the form that names w's owner on a command line.
func ownerName(w *dataplane.Workload) string {
	return w.Name.Namespace + "/" + strings.ToLower(w.Owner.Kind) + "/" + w.Owner.Name
}

// best prefers a pod that has traffic, is not on its way out, and runs on the answering
// agent's node, whose state is known at first hand.
func (q *Question) best(found []*dataplane.Workload) *dataplane.Workload {
	rank := func(w *dataplane.Workload) int {
		r := 0
		for _, preferred := range []bool{w.Live(), !w.Terminating, w.Node == q.Node, w.Ready} {
			r <<= 1
			if preferred {
				r |= 1
			}
		}
		return -r
	}
	return slices.MinFunc(found, func(a, b *dataplane.Workload) int { return cmp.Compare(rank(a), rank(b)) })
}

// destination is what the application dials.
type destination struct {
	typed    string // the host, as typed
	port     uint16
	addr     netip.AddrPort // invalid for a headless service without endpoints
	service  *dataplane.Service
	workload *dataplane.Workload // when a pod was named, or has the address
	headless bool
	detail   string
}

func (d destination) String() string {
	port := ":" + strconv.Itoa(int(d.port))
	switch {
	case d.service != nil:
		return d.service.Name.String() + port
	case d.workload != nil:
		return d.workload.Name.String() + port
	}
	return d.addr.String()
}

func (q *Question) destination(src *dataplane.Workload) (destination, error) {
	host, port, err := splitHostPort(q.Destination)
	if err != nil {
		return destination{}, err
	}
	d := destination{typed: host}
	if addr, err := netip.ParseAddr(host); err == nil {
		addr = addr.Unmap()
		d.service = q.Snapshot.ServiceAt(addr)
		if d.service == nil {
			d.workload = q.Snapshot.WorkloadAt(addr)
		}
		if d.port, err = portNumber(port, d.service); err != nil {
			return destination{}, err
		}
		d.addr = netip.AddrPortFrom(addr, d.port)
		if svc := q.Snapshot.ServiceAtExternal(d.addr); d.service == nil && svc != nil {
			d.service, d.workload = svc, nil
		}
		d.describe(q.Snapshot)
		return d, nil
	}
	if err := q.lookUp(&d, host, src); err != nil {
		return destination{}, err
	}
	if d.port, err = portNumber(port, d.service); err != nil {
		return destination{}, err
	}
	d.dial(src)
	d.describe(q.Snapshot)
	return d, nil
}

func splitHostPort(s string) (host, port string, err error) {
	i := strings.LastIndexByte(s, ':')
	if i <= 0 || i == len(s)-1 || strings.HasSuffix(s, "]") {
		return "", "", admin.Invalid(fmt.Sprintf("destination %q is not host:port, such as db:3306 or [fd00::5]:3306", s))
	}
	host, port = s[:i], s[i+1:]
	if inner, ok := strings.CutPrefix(host, "["); ok {
		if inner, ok = strings.CutSuffix(inner, "]"); !ok {
			return "", "", admin.Invalid(fmt.Sprintf("destination %q has an unclosed bracket", s))
		}
		return inner, port, nil
	}
	if strings.Contains(host, ":") {
		return "", "", admin.Invalid(fmt.Sprintf("destination %q has too many colons: write an IPv6 address in brackets, as in [fd00::5]:3306", s))
	}
	return host, port, nil
}

func portNumber(s string, service *dataplane.Service) (uint16, error) {
	if n, err := strconv.ParseUint(s, 10, 16); err == nil && n > 0 {
		return uint16(n), nil
	}
	if service != nil {
		for _, p := range service.Ports {
			if p.Name == s {
				return p.Port, nil
			}
		}
		return 0, admin.Invalid(fmt.Sprintf("service %s has no port %q: it has %s", service.Name, s, ports(service)))
	}
	return 0, admin.Invalid(fmt.Sprintf("port %q is not a number from 1 to 65535", s))
}

// lookUp finds the service or the pod that host names, seen from the source's namespace.
func (q *Question) lookUp(d *destination, host string, src *dataplane.Workload) error {
	ref, err := parseReference(host)
	if err != nil {
		return err
	}
	if !strings.Contains(host, "/") {
		d.service = q.serviceByDNS(host, src.Name.Namespace)
		if d.service != nil {
			return nil
		}
	}
	ref.namespace = cmp.Or(ref.namespace, src.Name.Namespace)
	if ref.kind == "" || ref.kind == kindService {
		if d.service = q.Snapshot.Service(dataplane.Name{Namespace: ref.namespace, Name: ref.name}); d.service != nil {
			return nil
		}
	}
	if ref.kind != kindService {
		if d.workload, err = q.pod(ref, host); err != nil || d.workload != nil {
			return err
		}
	}
	return q.unknown("service or pod", ref, true)
}

// serviceByDNS resolves as the pod's resolver does with the search domains that Kubernetes
// gives it: name, name.namespace, name.namespace.svc and the full name.
func (q *Question) serviceByDNS(host, namespace string) *dataplane.Service {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	for i := range q.Snapshot.Services() {
		if s := &q.Snapshot.Services()[i]; s.Host == host {
			return s
		}
	}
	label := strings.Split(host, ".")
	switch {
	case len(label) == 1:
		return q.Snapshot.Service(dataplane.Name{Namespace: namespace, Name: label[0]})
	case len(label) == 2, len(label) == 3 && label[2] == "svc":
		return q.Snapshot.Service(dataplane.Name{Namespace: label[1], Name: label[0]})
	}
	return nil
}

// dial chooses the address that the application would get for the name: one of a family
// that the source has, if there is one.
func (d *destination) dial(src *dataplane.Workload) {
	var addrs []netip.Addr
	switch {
	case d.workload != nil:
		addrs = d.workload.Addrs
	case len(d.service.Addrs) > 0:
		addrs = d.service.Addrs
	default: // headless: DNS answers with the endpoints themselves
		d.headless = true
		for _, e := range d.service.Endpoints {
			if e.Ready || d.service.PublishNotReady {
				addrs = append(addrs, e.Addr)
			}
		}
	}
	if len(addrs) == 0 {
		return
	}
	chosen := addrs[0]
	if i := slices.IndexFunc(addrs, func(a netip.Addr) bool {
		return slices.ContainsFunc(src.Addrs, func(own netip.Addr) bool { return own.Is4() == a.Is4() })
	}); i >= 0 {
		chosen = addrs[i]
	}
	d.addr = netip.AddrPortFrom(chosen, d.port)
}

// hasPort is about a service's port.
func (d *destination) hasPort() bool {
	_, ok := d.service.Port(d.port)
	return ok
}

// describe says what the name stands for.
func (d *destination) describe(s *dataplane.Snapshot) {
	switch {
	case d.service != nil:
		ready := 0
		for i := range d.service.Endpoints {
			if d.service.Endpoints[i].Ready {
				ready++
			}
		}
		d.detail = fmt.Sprintf("%d of %d endpoints are ready", ready, len(d.service.Endpoints))
		if len(d.service.Endpoints) == 0 {
			d.detail = "it has no endpoints: no pod matches its selector"
		}
		if d.headless {
			d.detail = "headless, its name stands for its endpoints; " + d.detail
		}
		if !d.hasPort() {
			d.detail += fmt.Sprintf("; it has no port %d, but %s", d.port, ports(d.service))
		}
	case d.workload != nil:
		d.detail = "on node " + d.workload.Node
	case d.addr.Addr().IsLoopback():
		d.detail = "the pod's own loopback"
	case s.InPodCIDR(d.addr.Addr()):
		d.detail = "an address of the pod network that no known pod has"
	default:
		d.detail = "neither a pod's nor a service's address: outside the cluster, or a node's"
	}
}

func ports(s *dataplane.Service) string {
	if len(s.Ports) == 0 {
		return "none"
	}
	var list []string
	for _, p := range s.Ports {
		text := strconv.Itoa(int(p.Port))
		if p.Name != "" {
			text += " (" + p.Name + ")"
		}
		list = append(list, text)
	}
	return strings.Join(list, ", ")
}

func quoted(s string) string { return strconv.Quote(s) }
