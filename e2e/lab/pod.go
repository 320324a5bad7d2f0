package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/space"
)

// PodSpec says what pod to make. Namespace and Name are required.
type PodSpec struct {
	Namespace      string // made without labels when the lab has none of that name
	Name           string
	Node           int               // counted from 1; default 1
	ServiceAccount string            // default "default"
	Labels         map[string]string // default app=<Deployment, else Name>
	Annotations    map[string]string
	Deployment     string // makes the pod one of a ReplicaSet of this Deployment
	HostNetwork    bool   // the pod is in its node's namespace
	NotReady       bool
}

// Pod is a pod of the cluster, running until RemovePod.
type Pod struct {
	*Host
	Name           dataplane.Name // not the Host's, which is namespace.name
	UID            string
	ServiceAccount string
	Node           *Node
	Deployment     string
	HostNetwork    bool

	annotations map[string]string // never changes
	labels      map[string]string // guarded by Lab.mu, as is ready
	ready       bool
}

// String is namespace/name.
func (p *Pod) String() string { return p.Name.String() }

// file is the pod's file in the cluster directory.
func (p *Pod) file() string { return "pod-" + p.Name.Namespace + "-" + p.Name.Name + ".yaml" }

// AddPod makes a pod: its namespace, its network, and last its YAML.
func (l *Lab) AddPod(spec PodSpec) (_ *Pod, err error) {
	if spec.Node == 0 {
		spec.Node = 1
	}
	if spec.ServiceAccount == "" {
		spec.ServiceAccount = "default"
	}
	if spec.Namespace == "" || spec.Name == "" || spec.Node < 1 || spec.Node > len(l.nodes) {
		return nil, fmt.Errorf("add pod %q in namespace %q on node %d: want a name, a namespace and one of %d nodes",
			spec.Name, spec.Namespace, spec.Node, len(l.nodes))
	}
	if err := l.ensureNamespace(spec.Namespace); err != nil {
		return nil, err
	}
	node := l.Node(spec.Node)
	p := &Pod{
		Name: dataplane.Name{Namespace: spec.Namespace, Name: spec.Name}, UID: randomUID(), ServiceAccount: spec.ServiceAccount,
		Node: node, Deployment: spec.Deployment, HostNetwork: spec.HostNetwork,
		annotations: maps.Clone(spec.Annotations), labels: maps.Clone(spec.Labels), ready: !spec.NotReady,
	}
	if p.labels == nil {
		p.labels = map[string]string{"app": spec.Name}
		if spec.Deployment != "" {
			p.labels["app"] = spec.Deployment
		}
	}
	if spec.Deployment != "" {
		p.labels["pod-template-hash"] = templateHash
	}
	if spec.HostNetwork {
		p.Host = node.Host
	} else if err := l.plug(p); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.ContainsFunc(l.pods, func(o *Pod) bool { return o.Name == p.Name }) {
		return nil, fmt.Errorf("add pod %s: there is one of that name", p)
	}
	l.pods = append(l.pods, p)
	return p, l.writePodLocked(p)
}

// plug makes the pod's namespace and connects it to its node.
func (l *Lab) plug(p *Pod) (err error) {
	if p.Host, err = l.newHost(p.Name.Namespace + "." + p.Name.Name); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return p.Node.plugPod(l.opts.families(), p.Host)
}

// RemovePod withdraws the pod's YAML, ends its processes and removes its namespace.
func (l *Lab) RemovePod(p *Pod) error {
	l.mu.Lock()
	l.pods = slices.DeleteFunc(l.pods, func(o *Pod) bool { return o == p })
	err := l.writeServicesLocked()
	l.mu.Unlock()
	if err != nil {
		return err
	}
	if err := l.DeleteFile(p.file()); err != nil || p.HostNetwork {
		return err
	}
	return l.unplug(p)
}

// VanishPod removes the pod's namespace and leaves its YAML, as when a node loses a pod
// before the API server hears of it.
func (l *Lab) VanishPod(p *Pod) error {
	if p.HostNetwork {
		return fmt.Errorf("vanish %s: it is in its node's namespace", p)
	}
	return l.unplug(p)
}

// unplug ends what runs in the pod, and the pod's namespace.
func (l *Lab) unplug(p *Pod) error {
	l.mu.Lock()
	processes := slices.Clone(l.processes)
	l.spaces = slices.DeleteFunc(l.spaces, func(o *space.Space) bool { return o == p.space })
	l.mu.Unlock()
	var errs []error
	for _, process := range processes {
		if process.Host == p.Host {
			errs = append(errs, process.Kill())
		}
	}
	return errors.Join(append(errs, p.space.Close())...)
}

// Pods lists the pods in the order of their making.
func (l *Lab) Pods() []*Pod {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.pods)
}

// Labels is a copy of the pod's labels.
func (l *Lab) Labels(p *Pod) map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(p.labels)
}

// LabelPod sets the pod's mode (dataplane.ModeAmbient or ModeNone); "" removes the label.
func (l *Lab) LabelPod(p *Pod, mode string) error {
	return l.SetPodLabel(p, dataplane.ModeLabel, mode)
}

// SetPodLabel sets one label of the pod; "" removes it. Services follow.
func (l *Lab) SetPodLabel(p *Pod, key, value string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	setOrDelete(p.labels, key, value)
	return l.writePodLocked(p)
}

// SetPodReady sets the pod's readiness. Services follow.
func (l *Lab) SetPodReady(p *Pod, ready bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.ready = ready
	return l.writePodLocked(p)
}

func setOrDelete(m map[string]string, key, value string) {
	if value == "" {
		delete(m, key)
		return
	}
	m[key] = value
}

// randomUID has the form of a Kubernetes UID (a UUID of version 4).
func randomUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	s := hex.EncodeToString(b[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
