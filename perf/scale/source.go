package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/kube"
)

// event is what a source's process tells the one that measures, a line of JSON each.
type event struct {
	At        time.Time `json:"at"`
	Published bool      `json:"published,omitempty"` // the first snapshot
	Current   bool      `json:"current,omitempty"`   // the first that is the API server's and no file's
	// Pod is the UID of one that was asked for and that is Ready, or is not, since just now.
	Pod   string `json:"pod,omitempty"`
	Ready bool   `json:"ready,omitempty"`
	Stats *stats `json:"stats,omitempty"`
}

// stats are of a source's process. They are told when asked for, after a garbage collection.
type stats struct {
	Snapshots int    `json:"snapshots"` // since the start
	Heap      uint64 `json:"heap"`      // bytes that are in use
	Allocated uint64 `json:"allocated"` // bytes since the start
	Workloads int    `json:"workloads"`
	Services  int    `json:"services"`
	Policies  int    `json:"policies"`
	Captured  int    `json:"captured"`
}

// watcher follows the snapshots of a source.
type watcher struct {
	source *kube.Source
	store  dataplane.Store
	pods   []string // UIDs to tell of

	mu        sync.Mutex
	out       *json.Encoder
	snapshots int
}

// runSource runs discovery/kube as the agent of one node does until its standard input ends,
// which is when its parent does.
func runSource(ctx context.Context, args []string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	flags := flag.NewFlagSet("source", flag.ExitOnError)
	kubeconfig := flags.String("kubeconfig", "", "path")
	node := flags.String("node", "", "the agent's")
	file := flags.String("snapshot-file", "", "path")
	pods := flags.String("pods", "", "UIDs of pods to tell of, comma separated")
	if err := flags.Parse(args); err != nil {
		return err
	}
	w := &watcher{pods: strings.Split(*pods, ","), out: json.NewEncoder(os.Stdout)}
	var err error
	w.source, err = kube.New(kube.Config{
		Kubeconfig: *kubeconfig, Node: *node, SnapshotFile: *file,
		MeshConfig: dataplane.Name{Namespace: "raceway-system", Name: "raceway"},
		Log:        slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	parts.Go(func() { w.follow(ctx) })
	parts.Go(func() {
		defer cancel()
		asked := bufio.NewScanner(os.Stdin)
		for asked.Scan() {
			w.tell(event{Stats: w.stats()})
		}
	})
	return w.source.Run(ctx, &w.store)
}

func (w *watcher) tell(e event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.At.IsZero() {
		e.At = time.Now()
	}
	if err := w.out.Encode(e); err != nil {
		fmt.Fprintln(os.Stderr, "scale: nobody listens:", err)
	}
}

// follow tells of the first snapshots, and of what changes of the pods that were asked for.
func (w *watcher) follow(ctx context.Context) {
	ready := make(map[string]bool)
	var last *dataplane.Snapshot
	current := false
	for {
		snapshot, changed := w.store.Load()
		if snapshot != nil && snapshot != last {
			now := time.Now()
			w.mu.Lock()
			w.snapshots++
			w.mu.Unlock()
			if last == nil {
				w.tell(event{At: now, Published: true})
			}
			if !current && !w.stale() {
				current = true
				w.tell(event{At: now, Current: true})
			}
			for _, uid := range w.pods {
				pod := snapshot.Workload(uid)
				if pod == nil {
					continue
				}
				if was, known := ready[uid]; known && was != pod.Ready {
					w.tell(event{At: now, Pod: uid, Ready: pod.Ready})
				}
				ready[uid] = pod.Ready
			}
			last = snapshot
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// stale reports whether what is published is still the file's.
func (w *watcher) stale() bool {
	for _, p := range w.source.Problems() {
		if strings.Contains(p.Cause, "is in force until the API server has told of all of it") {
			return true
		}
	}
	return false
}

func (w *watcher) stats() *stats {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	w.mu.Lock()
	out := &stats{Snapshots: w.snapshots, Heap: m.HeapAlloc, Allocated: m.TotalAlloc}
	w.mu.Unlock()
	snapshot, _ := w.store.Load()
	if snapshot == nil {
		return out
	}
	out.Workloads, out.Services = len(snapshot.Workloads()), len(snapshot.Services())
	out.Policies = len(snapshot.AuthorizationPolicies()) + len(snapshot.PeerAuthentications())
	for i := range snapshot.Workloads() {
		if snapshot.Workloads()[i].Captured {
			out.Captured++
		}
	}
	return out
}
