package object

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

// networkLabel is Istio's label for the network that a pod is on.
const networkLabel = "topology.istio.io/network"

// podTemplateHashLabel is what a Deployment appends to its ReplicaSets' names.
const podTemplateHashLabel = "pod-template-hash"

// staticHashAnnotation is what a kubelet writes on the mirror of a static pod.
const staticHashAnnotation = "kubernetes.io/config.hash"

// cronJobRun matches the name of a CronJob's Job: its own and the minutes since 1970 (older
// releases: the seconds).
var cronJobRun = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// pod is a Workload and what services need of it.
type pod struct {
	dataplane.Workload
	uidDerived bool
	ports      map[string]uint16 // named TCP container ports
	udpPorts   map[string]uint16 // likewise of UDP
}

// FromPod converts a Pod.
func FromPod(in *corev1.Pod) (Object, error) {
	name, err := namespacedName(&in.ObjectMeta)
	if err != nil {
		return Object{}, err
	}
	out := pod{
		Workload: dataplane.Workload{
			UID:            string(in.UID),
			Name:           name,
			ServiceAccount: intern(serviceAccount(&in.Spec)),
			Node:           intern(in.Spec.NodeName),
			Labels:         in.Labels,
			Owner:          owner(&in.ObjectMeta),
			Phase:          dataplane.Phase(intern(string(in.Status.Phase))),
			Ready:          podReady(&in.Status),
			HostNetwork:    in.Spec.HostNetwork,
			Terminating:    in.DeletionTimestamp != nil,
			Network:        in.Labels[networkLabel],
			NetNS:          in.Annotations[dataplane.NetNSAnnotation],
			StaticHash:     staticHash(in),
			UDPClear:       clearPorts(in.Annotations[dataplane.UDPClearAnnotation]),
		},
		ports:    namedPorts(&in.Spec, corev1.ProtocolTCP),
		udpPorts: namedPorts(&in.Spec, corev1.ProtocolUDP),
	}
	if out.Phase == "" {
		out.Phase = dataplane.PodPending
	}
	if out.UID == "" {
		out.UID, out.uidDerived = derivedUID(name), true
	} else if err := validUID(out.UID); err != nil {
		return Object{}, err
	}
	// The trust domain is the mesh's; any valid one proves the rest.
	id := spiffe.ID{TrustDomain: "cluster.local", Namespace: name.Namespace, ServiceAccount: out.ServiceAccount}
	if err := id.Validate(); err != nil {
		return Object{}, fmt.Errorf("spec.serviceAccountName: %w", err)
	}
	if err := podAddrs(&out.Workload, &in.Status); err != nil {
		return Object{}, err
	}
	return Object{Key: Key{Kind: KindPod, Name: name}, value: out}, nil
}

// staticHash is the UID of a static pod on its node, where the API server knows but its
// mirror. Whoever may annotate a pod can claim one: it is a place to look, no proof.
func staticHash(in *corev1.Pod) string {
	hash := in.Annotations[staticHashAnnotation]
	if in.Annotations[corev1.MirrorPodAnnotationKey] == "" || validUID(hash) != nil {
		return ""
	}
	return hash
}

func podAddrs(w *dataplane.Workload, status *corev1.PodStatus) error {
	ips := make([]string, 0, len(status.PodIPs)+1)
	for _, ip := range status.PodIPs {
		ips = append(ips, ip.IP)
	}
	for _, ip := range append(ips, status.PodIP) {
		if ip == "" {
			continue
		}
		a, err := parseAddr("status.podIPs", ip)
		if err != nil {
			return err
		}
		w.Addrs = appendAddr(w.Addrs, a)
	}
	return nil
}

func serviceAccount(spec *corev1.PodSpec) string {
	switch {
	case spec.ServiceAccountName != "":
		return spec.ServiceAccountName
	case spec.DeprecatedServiceAccount != "":
		return spec.DeprecatedServiceAccount
	default:
		return "default"
	}
}

func podReady(status *corev1.PodStatus) bool {
	for _, c := range status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// owner collapses what controllers put between a pod and what people call it.
func owner(meta *metav1.ObjectMeta) dataplane.Owner {
	ref := metav1.GetControllerOfNoCopy(meta)
	if ref == nil {
		return dataplane.Owner{Kind: "Pod", Name: meta.Name}
	}
	switch ref.Kind {
	case "ReplicaSet":
		hash := meta.Labels[podTemplateHashLabel]
		if base, ok := strings.CutSuffix(ref.Name, "-"+hash); ok && hash != "" && base != "" {
			return dataplane.Owner{Kind: "Deployment", Name: intern(base)}
		}
	case "Job":
		if m := cronJobRun.FindStringSubmatch(ref.Name); m != nil {
			return dataplane.Owner{Kind: "CronJob", Name: intern(m[1])}
		}
	}
	return dataplane.Owner{Kind: intern(ref.Kind), Name: intern(ref.Name)}
}

// namedPorts collects what a service's targetPort can name: ports of containers, and of
// init containers that go on running beside them. The first of a name counts, as in Kubernetes.
func namedPorts(spec *corev1.PodSpec, protocol corev1.Protocol) map[string]uint16 {
	containers := make([]corev1.Container, 0, len(spec.Containers)+len(spec.InitContainers))
	containers = append(containers, spec.Containers...)
	for _, c := range spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			containers = append(containers, c)
		}
	}
	var out map[string]uint16
	for _, c := range containers {
		for _, p := range c.Ports {
			port, err := parsePort(p.Name, p.ContainerPort)
			if p.Name == "" || !isProtocol(p.Protocol, protocol) || err != nil {
				continue // a port that cannot be is a target of nothing
			}
			if _, taken := out[p.Name]; taken {
				continue
			}
			if out == nil {
				out = make(map[string]uint16)
			}
			out[p.Name] = port
		}
	}
	return out
}

// isProtocol takes what says nothing for TCP, as Kubernetes does.
func isProtocol(p, want corev1.Protocol) bool {
	return p == want || p == "" && want == corev1.ProtocolTCP
}

// isCarried reports whether a port is of a protocol that tunnels carry.
func isCarried(p corev1.Protocol) bool {
	return isProtocol(p, corev1.ProtocolTCP) || isProtocol(p, corev1.ProtocolUDP)
}

// maxClearPorts is how many ranges the kernel's side takes.
const maxClearPorts = 8

// clearPorts reads ports and ranges of them: "123,10000-20000". Of a list that cannot be read as
// a whole none is left alone: that is safe, and the pod stays known.
func clearPorts(text string) []dataplane.PortRange {
	var ranges []dataplane.PortRange
	for part := range strings.SplitSeq(text, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}
		from, fromErr := strconv.ParseUint(first, 10, 16)
		to, toErr := strconv.ParseUint(last, 10, 16)
		if fromErr != nil || toErr != nil || from == 0 || from > to || len(ranges) == maxClearPorts {
			return nil
		}
		ranges = append(ranges, dataplane.PortRange{First: uint16(from), Last: uint16(to)})
	}
	return ranges
}
