package kube

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// sandbox is the network of a pod of this node, and what the cluster said of the pod when it
// was made: a pod whose sandbox died gets another, and its status is the old one's for a while.
type sandbox struct {
	discovery.Sandbox
	addrs   []netip.Addr
	ready   bool
	running bool
	settled bool // the cluster knows the sandbox: it no longer has to be told
}

// Started adds the sandbox to the pod until the cluster has its addresses, and returns the
// pod as the next Snapshots show it.
func (s *Source) Started(ctx context.Context, started discovery.Sandbox) (dataplane.Workload, error) {
	if err := s.fetch(ctx, started.Pod, started.UID); err != nil {
		return dataplane.Workload{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := object.Key{Kind: object.KindPod, Name: started.Pod}
	w, known := s.workloadLocked(key)
	if !known || started.UID != "" && w.UID != started.UID {
		return dataplane.Workload{}, fmt.Errorf("pod %s: gone while it was asked for", started.Pod)
	}
	started.UID = w.UID
	s.sandboxes[started.Pod] = &sandbox{
		Sandbox: started, addrs: w.Addrs, ready: w.Ready, running: s.pods[key].running,
	}
	s.settleLocked(key)
	s.changedLocked(urgent)
	list := []dataplane.Workload{w}
	s.overlayLocked(list)
	w = list[0]
	w.Cluster = s.config.Cluster
	w.Identity = spiffe.ID{TrustDomain: s.config.TrustDomain, Namespace: w.Name.Namespace, ServiceAccount: w.ServiceAccount}
	w.Enrolled = w.Live() && s.wantsLocked(&w)
	captured, udp := s.capturedLocked(list)
	w.Captured = w.Live() && !w.HostNetwork && captured[w.UID]
	w.UDP = w.Captured && udp[w.UID]
	return w, nil
}

// Stopped takes back what Started added.
func (s *Source) Stopped(pod dataplane.Name, uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sb := s.sandboxes[pod]
	if sb == nil || uid != "" && sb.UID != uid {
		return
	}
	delete(s.sandboxes, pod)
	if key := (object.Key{Kind: object.KindPod, Name: pod}); s.fetched[key] {
		s.dropLocked(key) // no watch ever showed it
	}
	s.changedLocked(urgent)
}

// fetch asks the API server for a pod and its namespace, unless watches have shown them.
func (s *Source) fetch(ctx context.Context, pod dataplane.Name, uid string) error {
	podKey := object.Key{Kind: object.KindPod, Name: pod}
	nsKey := object.Key{Kind: object.KindNamespace, Name: dataplane.Name{Name: pod.Namespace}}
	s.mu.Lock()
	w, podKnown := s.workloadLocked(podKey)
	_, nsKnown := s.set.Get(nsKey)
	s.mu.Unlock()
	if !nsKnown {
		ns, err := s.config.Client.Namespaces().Get(ctx, pod.Namespace, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("ask for namespace %s: %w", pod.Namespace, err)
		}
		if err := s.takeFetched(convert(object.KindNamespace, ns)); err != nil {
			return err
		}
	}
	if podKnown && (uid == "" || w.UID == uid) {
		return nil
	}
	in, err := s.config.Client.Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("ask for pod %s: %w", pod, err)
	}
	if uid != "" && string(in.UID) != uid {
		return fmt.Errorf("pod %s has the UID %s and not %s: it was replaced", pod, in.UID, uid)
	}
	return s.takeFetched(convert(object.KindPod, in))
}

func (s *Source) takeFetched(it *item) error {
	if it.fault != "" {
		return fmt.Errorf("%s: %s", it.key, it.fault)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, there := s.set.Get(it.key); there {
		if w, _ := o.Workload(); it.key.Kind == object.KindNamespace || w.UID == it.uid {
			return nil // a watch was faster, and goes on from what it has shown
		}
	}
	s.changedLocked(s.takeLocked(it))
	s.fetched[it.key] = true
	return nil
}

func (s *Source) workloadLocked(key object.Key) (dataplane.Workload, bool) {
	o, _ := s.set.Get(key)
	return o.Workload()
}

// settleLocked reports whether the cluster knows the pod's sandbox since just now: it has
// addresses of it, or says of the pod what it did not before.
func (s *Source) settleLocked(key object.Key) bool {
	sb := s.sandboxes[key.Name]
	if sb == nil {
		return false
	}
	w, _ := s.workloadLocked(key)
	if sb.settled || w.UID != sb.UID {
		return false
	}
	fresh := len(w.Addrs) > 0 && !slices.Equal(w.Addrs, sb.addrs)
	same := slices.ContainsFunc(sb.Addrs, func(a netip.Addr) bool { return slices.Contains(w.Addrs, a) })
	sb.settled = fresh || same || w.Ready && !sb.ready || s.pods[key].running && !sb.running
	return sb.settled
}

// overlayLocked adds sandboxes to pods.
func (s *Source) overlayLocked(workloads []dataplane.Workload) {
	if len(s.sandboxes) == 0 {
		return
	}
	for i := range workloads {
		w := &workloads[i]
		sb := s.sandboxes[w.Name]
		if sb == nil || sb.UID != w.UID {
			continue
		}
		w.NetNS = sb.NetNS
		if !sb.settled {
			w.Starting = true
		}
		if len(sb.Addrs) > 0 && (!sb.settled || len(w.Addrs) == 0) {
			w.Addrs = sb.Addrs
		}
	}
}
