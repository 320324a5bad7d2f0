package kernel_test

import (
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// BenchmarkDirect asks over a connection between two pods of a node, a kilobyte each way, by
// the kernel and without any data plane. The guards' own time for a request and its answer is
// reported as well, by the kernel's measure.
func BenchmarkDirect(b *testing.B) {
	netnstest.Require(b)
	f := newDirect(b, modes()[0])
	to := at(f.db.V4, 8080)
	l := listenOn(b, f.db, to)
	f.allow(b, to, 1, to)
	client, server := f.pair(b, l, to)
	b.Run("kernel", func(b *testing.B) {
		pins, err := filepath.Glob(filepath.Join(pinDir(f.fixture), "pods", "*", "guard"))
		if err != nil || len(pins) != 2 {
			b.Fatalf("guards %v: %v", pins, err)
		}
		counting, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
		if err != nil {
			b.Fatal(err)
		}
		defer counting.Close()
		before := spent(b, pins[0]) + spent(b, pins[1])
		exchange(b, client, server)
		b.ReportMetric(float64(spent(b, pins[0])+spent(b, pins[1])-before)/float64(b.N), "guards-ns/op")
	})
	third := f.node.NewPod(b)
	plain := listenOn(b, third, at(third.V4, 8080))
	b.Run("no data plane", func(b *testing.B) {
		exchange(b, dial(b, f.other.Namespace, at(third.V4, 8080)), accept(b, plain))
	})
}

func exchange(b *testing.B, client, server net.Conn) {
	go func() {
		buf := make([]byte, 1024)
		for {
			if _, err := io.ReadFull(server, buf); err != nil {
				return
			}
			if _, err := server.Write(buf); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 1024)
	for b.Loop() {
		if _, err := client.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, buf); err != nil {
			b.Fatal(err)
		}
	}
}
