package lab

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/dataplane"
)

// templateHash stands for the hash that the Deployment controller appends to a ReplicaSet's name.
const templateHash = "5d9c7b6f48"

// ServiceSpec says what service to make. Namespace, Name and a port are required.
type ServiceSpec struct {
	Namespace string
	Name      string
	Selector  map[string]string // default app=<Name>
	Ports     []ServicePort
	// InternalTraffic and Distribution are as in Kubernetes; zero values leave them unset.
	InternalTraffic dataplane.TrafficPolicy
	Distribution    dataplane.TrafficDistribution
}

// ServicePort is one TCP port of a service.
type ServicePort struct {
	Name   string // default p<Port>
	Port   uint16
	Target uint16 // default Port
}

// Service is a service of the cluster. Its endpoints follow the pods.
type Service struct {
	ServiceSpec
	VIPs []netip.Addr // cluster IPs, in the order of the lab's families
}

// ApplyFile writes a file of YAML into the cluster directory, at once: a reader sees the old
// content or the new, never a part.
func (l *Lab) ApplyFile(name, content string) error {
	if filepath.Base(name) != name {
		return fmt.Errorf("apply %s: want a file name without a directory", name)
	}
	return l.writeAtomically(filepath.Join(l.ClusterDir(), name), []byte(content), 0o644)
}

// DeleteFile removes a file from the cluster directory; one that is not there is no error.
func (l *Lab) DeleteFile(name string) error {
	err := os.Remove(filepath.Join(l.ClusterDir(), filepath.Base(name)))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}

// writeAtomically makes the new file beside the directory that is watched, not in it.
func (l *Lab) writeAtomically(path string, content []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(l.tmpDir(), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}

// apply writes Kubernetes objects as one file, a YAML document each.
func (l *Lab) apply(name string, objects ...any) error {
	var content []byte
	for _, o := range objects {
		doc, err := yaml.Marshal(o)
		if err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		content = append(append(content, "---\n"...), doc...)
	}
	return l.ApplyFile(name, string(content))
}

// AddNamespace adds a namespace, or replaces the labels of one. labels may be nil.
func (l *Lab) AddNamespace(name string, labels map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	labels = maps.Clone(labels)
	if labels == nil {
		labels = make(map[string]string)
	}
	labels[corev1.LabelMetadataName] = name
	l.namespaces[name] = labels
	return l.writeNamespaceLocked(name)
}

// LabelNamespace sets the namespace's mode (dataplane.ModeAmbient or ModeNone); "" removes
// the label.
func (l *Lab) LabelNamespace(name, mode string) error {
	if err := l.ensureNamespace(name); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	setOrDelete(l.namespaces[name], dataplane.ModeLabel, mode)
	return l.writeNamespaceLocked(name)
}

func (l *Lab) ensureNamespace(name string) error {
	l.mu.Lock()
	known := l.namespaces[name] != nil
	l.mu.Unlock()
	if known {
		return nil
	}
	return l.AddNamespace(name, nil)
}

func (l *Lab) writeNamespaceLocked(name string) error {
	return l.apply("namespace-"+name+".yaml", &corev1.Namespace{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("ns-" + name), Labels: l.namespaces[name]},
		Status:     corev1.NamespaceStatus{Phase: corev1.NamespaceActive},
	})
}

func (l *Lab) writeNode(n *Node) error {
	node := &corev1.Node{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{
			Name: n.Name,
			UID:  types.UID("node-" + n.Name),
			Labels: map[string]string{
				corev1.LabelHostname:       n.Name,
				corev1.LabelTopologyRegion: n.Region,
				corev1.LabelTopologyZone:   n.Zone,
			},
		},
		Spec: corev1.NodeSpec{PodCIDR: n.PodCIDRs[0].String()},
		Status: corev1.NodeStatus{
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
		},
	}
	for _, cidr := range n.PodCIDRs {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, cidr.String())
	}
	for _, a := range n.Addrs {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	return l.apply("node-"+n.Name+".yaml", node)
}

func (l *Lab) writePodLocked(p *Pod) error {
	ready := corev1.ConditionFalse
	if p.ready {
		ready = corev1.ConditionTrue
	}
	annotations := map[string]string{dataplane.NetNSAnnotation: p.NetNS()}
	maps.Copy(annotations, p.annotations)
	pod := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Name.Namespace, Name: p.Name.Name, UID: types.UID(p.UID), Labels: p.labels,
			Annotations: annotations,
		},
		Spec: corev1.PodSpec{
			NodeName: p.Node.Name, ServiceAccountName: p.ServiceAccount, HostNetwork: p.HostNetwork,
			Containers: []corev1.Container{{Name: "app", Image: "lab"}},
		},
		Status: corev1.PodStatus{
			Phase:  corev1.PodRunning,
			HostIP: p.Node.Addr().String(),
			PodIP:  p.Addr().String(),
			Conditions: []corev1.PodCondition{
				{Type: corev1.PodInitialized, Status: corev1.ConditionTrue},
				{Type: corev1.PodReady, Status: ready},
			},
		},
	}
	if p.Deployment != "" {
		controller := true
		pod.OwnerReferences = []metav1.OwnerReference{{
			APIVersion: "apps/v1", Kind: "ReplicaSet", Name: p.Deployment + "-" + templateHash,
			UID: types.UID("rs-" + p.Name.Namespace + "-" + p.Deployment), Controller: &controller,
		}}
	}
	for _, a := range p.Addrs {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	for _, a := range p.Node.Addrs {
		pod.Status.HostIPs = append(pod.Status.HostIPs, corev1.HostIP{IP: a.String()})
	}
	if err := l.apply(p.file(), pod); err != nil {
		return err
	}
	return l.writeServicesLocked()
}

// AddService adds a service with a cluster IP of each family. Its endpoints follow the pods.
func (l *Lab) AddService(spec ServiceSpec) (*Service, error) {
	if spec.Namespace == "" || spec.Name == "" || len(spec.Ports) == 0 {
		return nil, fmt.Errorf("add service %q in namespace %q: want a name, a namespace and a port", spec.Name, spec.Namespace)
	}
	if err := l.ensureNamespace(spec.Namespace); err != nil {
		return nil, err
	}
	if spec.Selector == nil {
		spec.Selector = map[string]string{"app": spec.Name}
	}
	spec.Ports = slices.Clone(spec.Ports)
	for i := range spec.Ports {
		port := &spec.Ports[i]
		if port.Name == "" {
			port.Name = "p" + strconv.Itoa(int(port.Port))
		}
		if port.Target == 0 {
			port.Target = port.Port
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &Service{ServiceSpec: spec}
	l.nextVIP++
	for _, p := range l.opts.families() {
		s.VIPs = append(s.VIPs, nth(p.services, l.nextVIP))
	}
	l.services = append(l.services, s)
	return s, l.writeServiceLocked(s)
}

// RemoveService removes the service and its endpoints.
func (l *Lab) RemoveService(s *Service) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.services = slices.DeleteFunc(l.services, func(o *Service) bool { return o == s })
	return l.DeleteFile(s.file())
}

func (s *Service) file() string { return "service-" + s.Namespace + "-" + s.Name + ".yaml" }

func (l *Lab) writeServicesLocked() error {
	var errs []error
	for _, s := range l.services {
		errs = append(errs, l.writeServiceLocked(s))
	}
	return errors.Join(errs...)
}

// writeServiceLocked writes the service and its slices (one for each family) as one file.
func (l *Lab) writeServiceLocked(s *Service) error {
	svc := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, UID: types.UID("svc-" + s.Namespace + "-" + s.Name)},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, Selector: s.Selector,
			ClusterIP: s.VIPs[0].String(),
		},
	}
	for _, a := range s.VIPs {
		svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, a.String())
		svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, corev1.IPFamily(familyOf(a)))
	}
	for _, p := range s.Ports {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{
			Name: p.Name, Protocol: corev1.ProtocolTCP, Port: int32(p.Port), TargetPort: intstr.FromInt32(int32(p.Target)),
		})
	}
	if s.InternalTraffic != "" {
		policy := corev1.ServiceInternalTrafficPolicy(s.InternalTraffic)
		svc.Spec.InternalTrafficPolicy = &policy
	}
	if s.Distribution != "" {
		distribution := string(s.Distribution)
		svc.Spec.TrafficDistribution = &distribution
	}
	objects := []any{svc}
	for family, vip := range s.VIPs {
		objects = append(objects, l.sliceLocked(s, family, familyOf(vip)))
	}
	return l.apply(s.file(), objects...)
}

// sliceLocked holds the endpoints of one family, given by its place in the lab's families.
func (l *Lab) sliceLocked(s *Service, family int, addressType string) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace, Name: s.Name + "-" + addressType[len("IP"):],
			Labels: map[string]string{discoveryv1.LabelServiceName: s.Name},
		},
		AddressType: discoveryv1.AddressType(addressType),
	}
	for _, p := range s.Ports {
		protocol, target := corev1.ProtocolTCP, int32(p.Target)
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &protocol, Port: &target})
	}
	for _, p := range l.pods {
		if p.Name.Namespace != s.Namespace || !dataplane.MatchLabels(s.Selector, p.labels) {
			continue
		}
		ready, terminating := p.ready, false
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{p.Addrs[family].String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready, Terminating: &terminating},
			NodeName:   &p.Node.Name,
			Zone:       &p.Node.Zone,
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: p.Name.Namespace, Name: p.Name.Name, UID: types.UID(p.UID)},
		})
	}
	return slice
}

// familyOf is Kubernetes' word for a's family, the same for IPFamily and AddressType.
func familyOf(a netip.Addr) string {
	if a.Is4() {
		return string(corev1.IPv4Protocol)
	}
	return string(corev1.IPv6Protocol)
}
