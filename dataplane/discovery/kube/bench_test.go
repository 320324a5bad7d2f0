package kube

import (
	"fmt"
	"io"
	"log/slog"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/raceway-mesh/raceway/dataplane"
)

// crowd is a source that knows a large cluster, all of it captured.
func crowd(b *testing.B, pods int) *Source {
	b.Helper()
	r := newRig(b)
	r.config.SnapshotFile, r.config.Log = "", slog.New(slog.DiscardHandler)
	s, err := New(r.config)
	if err != nil {
		b.Fatal(err)
	}
	s.take(convert("Namespace", shop()))
	for n := range pods {
		s.take(convert("Pod", crowded(n)))
	}
	for _, res := range s.resources() {
		s.synced[res.kind] = true
	}
	return s
}

func crowded(n int) *corev1.Pod {
	p := withAnnotation(running(fmt.Sprintf("app-%04d-5d78c9869d-%05d", n/10, n), fmt.Sprintf("node-%04d", n/50), fmt.Sprintf("10.%d.%d.%d", n>>16, n>>8&255, n&255)), true)
	p.UID = types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", n))
	p.Labels = map[string]string{"app": fmt.Sprint(n / 10)}
	return p
}

func BenchmarkPublish(b *testing.B) {
	s := crowd(b, 50_000)
	store := new(dataplane.Store)
	s.publish(store)
	for n := range b.N {
		b.StopTimer()
		p := crowded(n % 50_000)
		p.Labels["round"] = fmt.Sprint(n)
		s.take(convert("Pod", p))
		b.StartTimer()
		s.publish(store)
	}
}

func BenchmarkWriteSnapshotFile(b *testing.B) {
	s := crowd(b, 50_000)
	for b.Loop() {
		start := time.Now()
		head, objects, ok := s.state()
		if !ok {
			b.Fatal("not all kinds are known")
		}
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms-locked")
		if err := encodeSnapshot(io.Discard, head, objects); err != nil {
			b.Fatal(err)
		}
	}
}
