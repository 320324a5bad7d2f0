package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// change makes a pod ready, or not, as its kubelet and then the controller of its
// service's slice would. It returns when the pod was written.
func (s *site) change(ctx context.Context, p *pod, client int) (written time.Time, ready bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := s.config
	ready = !p.ready.Load()
	status := c.running(p.number, ready)
	patch, err := json.Marshal(map[string]any{"status": map[string]any{
		"conditions": status.Conditions, "containerStatuses": status.ContainerStatuses,
	}})
	if err != nil {
		return time.Time{}, false, err
	}
	api, app := s.clients[client%connections], c.appOf(p.number)
	_, err = api.CoreV1().Pods(c.namespaceOf(app)).Patch(ctx, p.name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return time.Time{}, false, fmt.Errorf("change pod %s: %w", p.name, err)
	}
	written = time.Now()
	p.ready.Store(ready)

	s.services[app].Lock()
	defer s.services[app].Unlock()
	slice := c.slice(app, s.byApp[app])
	if _, err := api.DiscoveryV1().EndpointSlices(slice.Namespace).Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
		return time.Time{}, false, fmt.Errorf("change an EndpointSlice: %w", err)
	}
	return written, ready, nil
}

// load changes pods at the configured rate until ctx ends, those that probe follows aside.
// It returns how many it changed.
func (s *site) load(ctx context.Context, spared map[*pod]bool) (changes int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	free := make(chan struct{}, writers)
	start := time.Now()
	for ; ; changes++ {
		due := start.Add(time.Duration(float64(changes) / s.config.Rate * float64(time.Second)))
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(due)):
		}
		if ctx.Err() != nil {
			break
		}
		p := s.pods[rand.IntN(len(s.pods))]
		for spared[p] {
			p = s.pods[rand.IntN(len(s.pods))]
		}
		free <- struct{}{}
		all.Go(func() {
			defer func() { <-free }()
			// One that has begun is not broken off.
			if _, _, err := s.change(context.WithoutCancel(ctx), p, p.number); err != nil {
				cancel(err)
			}
		})
	}
	all.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return changes, err
	}
	return changes, nil
}

const (
	probeEvery = 250 * time.Millisecond
	// probeTimeout is more than any publication takes: a change that does not come by then
	// is an error and no latency.
	probeTimeout = 30 * time.Second
)

// probe changes a pod again and again and returns how long each change took from the API
// server's answer to the source's snapshot.
func (s *site) probe(ctx context.Context, p *pod, seen <-chan event) (latencies []time.Duration, err error) {
	for {
		written, ready, err := s.change(context.WithoutCancel(ctx), p, p.number)
		if err != nil {
			return nil, err
		}
		select {
		case e, going := <-seen:
			if !going {
				return nil, errors.New("the source ended while it was measured")
			}
			if e.Ready != ready {
				return nil, fmt.Errorf("pod %s is shown as ready=%v, and it is %v", p.name, e.Ready, ready)
			}
			latencies = append(latencies, e.At.Sub(written))
		case <-time.After(probeTimeout):
			return nil, fmt.Errorf("a change of pod %s is not in a snapshot after %v", p.name, probeTimeout)
		}
		select {
		case <-ctx.Done():
			return latencies, nil
		case <-time.After(probeEvery/2 + rand.N(probeEvery)):
		}
	}
}

// probes are a pod of the first node, and one of the last.
func (s *site) probes() (own, foreign *pod) {
	for _, p := range s.pods {
		if s.config.podNode(p.number) == 0 {
			own = p
		}
		if s.config.podNode(p.number) == s.config.Nodes-1 {
			foreign = p
		}
	}
	return own, foreign
}
