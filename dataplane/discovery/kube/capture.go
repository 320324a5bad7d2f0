package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

const (
	// patchTimeout bounds one patch: whoever waits for it tries again.
	patchTimeout = 5 * time.Second
	// patchesAtOnce bounds the patches under way.
	patchesAtOnce = 16
)

// capturedLocked tells which pods take tunnels. Another node's pod that did and is still
// wanted goes on, whoever removed its annotation; its agent puts it back. Of this node's pods
// this agent knows, once it has said so, whatever their annotations say.
//
// UDP is taken to be in tunnels by the same rule: a peer that is spoken to in clear, as its
// annotation went for a moment, would get what is not meant for others' eyes.
func (s *Source) capturedLocked(workloads []dataplane.Workload) (captured, udp map[string]bool) {
	captured, udp = make(map[string]bool, len(s.captured)), make(map[string]bool, len(s.udp))
	for i := range workloads {
		w := &workloads[i]
		takes := s.pods[object.Key{Kind: object.KindPod, Name: w.Name}].annotated
		if !takes.captured && s.captured[w.UID] && s.wantsLocked(w) {
			takes = mark{captured: true, udp: s.udp[w.UID]}
		}
		if s.wanted != nil && w.Node == s.config.Node {
			takes = s.wanted[w.UID]
		}
		if takes.captured {
			captured[w.UID] = true
		}
		if takes.captured && takes.udp {
			udp[w.UID] = true
		}
	}
	return captured, udp
}

// wantsLocked reports whether labels ask for the pod's capture.
func (s *Source) wantsLocked(w *dataplane.Workload) bool {
	o, _ := s.set.Get(object.Key{Kind: object.KindNamespace, Name: dataplane.Name{Name: w.Name.Namespace}})
	ns, known := o.Namespace()
	return known && !s.releases && !w.HostNetwork && dataplane.WantsEnrolment(w.Labels, ns.Labels, s.config.EnrollLabels...)
}

// PublishCaptured annotates the pods of this node with these UIDs and removes the annotation
// from the others, and keeps it so while Run runs. A pod that is gone needs nothing. It
// returns an error at once while the API server is away.
func (s *Source) PublishCaptured(ctx context.Context, uids, udp []string) error {
	wanted, datagrams := make(map[string]mark, len(uids)), setOf(udp)
	for _, uid := range uids {
		wanted[uid] = mark{captured: true, udp: datagrams[uid]}
	}
	s.mu.Lock()
	s.wanted = wanted
	s.changedLocked(urgent)
	s.mu.Unlock()
	return s.annotate(ctx)
}

func setOf(uids []string) map[string]bool {
	set := make(map[string]bool, len(uids))
	for _, uid := range uids {
		set[uid] = true
	}
	return set
}

// annotation is what a pod is to be marked with, and is not.
type annotation struct {
	key object.Key
	uid string
	on  mark
}

// annotate makes the annotations of this node's pods what they are wanted to be.
func (s *Source) annotate(ctx context.Context) error {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	list := s.unpublished()
	if len(list) == 0 {
		return nil
	}
	if err := s.away(); err != nil {
		return err
	}
	var (
		mu   sync.Mutex
		errs []error
		all  sync.WaitGroup
		free = make(chan struct{}, patchesAtOnce)
	)
	for _, a := range list {
		free <- struct{}{}
		all.Go(func() {
			defer func() { <-free }()
			if err := s.patchAnnotation(ctx, a); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("pod %s: %w", a.key.Name, err))
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// unpublished lists this node's pods that are not annotated as wanted.
func (s *Source) unpublished() []annotation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wanted == nil {
		return nil
	}
	var list []annotation
	for key, pod := range s.pods {
		if on := s.wanted[pod.uid]; on != pod.annotated && s.ownLocked(key) {
			list = append(list, annotation{key, pod.uid, on})
		}
	}
	slices.SortFunc(list, func(a, b annotation) int { return a.key.Compare(b.key) })
	return list
}

func (s *Source) patchAnnotation(ctx context.Context, a annotation) error {
	err := s.patchPod(ctx, a.key.Name, a.uid, a.on.annotations())
	if err != nil {
		return err
	}
	// The watch will say the same; until then nothing is to be done twice.
	s.mu.Lock()
	defer s.mu.Unlock()
	if pod, there := s.pods[a.key]; there && pod.uid == a.uid {
		pod.annotated = a.on
		s.pods[a.key] = pod
		s.changedLocked(urgent)
	}
	return nil
}

// annotations are m as a merge patch has it: null removes.
func (m mark) annotations() map[string]any {
	all := map[string]any{dataplane.RedirectionAnnotation: nil, dataplane.UDPAnnotation: nil}
	if m.captured {
		all[dataplane.RedirectionAnnotation] = dataplane.RedirectionEnabled
	}
	if m.captured && m.udp {
		all[dataplane.UDPAnnotation] = dataplane.UDPEnabled
	}
	return all
}

// markOf reads what annotations wrote.
func markOf(annotations map[string]string) mark {
	return mark{
		captured: annotations[dataplane.RedirectionAnnotation] == dataplane.RedirectionEnabled,
		udp:      annotations[dataplane.UDPAnnotation] == dataplane.UDPEnabled,
	}
}

// patchPod changes annotations of the pod with that UID, "" for any. A pod that is gone, or
// has another's place, needs none.
func (s *Source) patchPod(ctx context.Context, pod dataplane.Name, uid string, annotations map[string]any) error {
	meta := map[string]any{"annotations": annotations}
	if uid != "" {
		meta["uid"] = uid // the API server refuses another's
	}
	patch, err := json.Marshal(map[string]any{"metadata": meta})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patchTimeout)
	defer cancel()
	pods := s.config.Client.Pods(pod.Namespace)
	_, err = pods.Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsInvalid(err) && uid != "" { // no patch changes the UID
		now, other := pods.Get(ctx, pod.Name, metav1.GetOptions{})
		if other == nil && string(now.UID) != uid || apierrors.IsNotFound(other) {
			return nil
		}
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// repair puts annotations back that others changed, at a pace at which nobody can be fought.
func (s *Source) repair(ctx context.Context) {
	pause, told := s.pace.mending, ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.repairs:
		}
		err := s.annotate(ctx)
		switch {
		case err == nil:
			pause, told = s.pace.mending, ""
		case ctx.Err() == nil:
			if err.Error() != told {
				told = err.Error()
				s.config.Log.Warn("repair the annotations of captured pods", "error", err)
			}
			s.repairs.give()
		}
		if !sleep(ctx, pause) {
			return
		}
		if err != nil {
			pause = min(2*pause, max(s.pace.mending, s.pace.retryMax))
		}
	}
}
