package proxy

import (
	"log/slog"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone/h2"
)

// Limits bound what one pod can take from the node and from other pods. A zero field has
// its default.
type Limits struct {
	// PodConnections and NodeConnections bound the connections carried at one time; more
	// are reset. 10,000 and 50,000.
	PodConnections, NodeConnections int
	// PodFlows bounds a pod's flows of UDP, which count among NodeConnections as well; datagrams
	// of more are dropped. 16,384.
	PodFlows int
	// PodFiles and NodeFiles bound the open files of connections: one for each in a tunnel,
	// which shares the tunnel's, and two for each in clear; more are reset. No bound.
	PodFiles, NodeFiles int64
	// PodPending bounds a pod's connections that are still being routed, authorized or
	// dialed; more are reset. 1,024.
	PodPending int
	// PodHandshakes bounds the TLS handshakes of tunnels to a pod that go on at one time;
	// more wait in the kernel's backlog, and more than a quarter from one address are closed. 64.
	PodHandshakes int
	// PodTunnels bounds the tunnel connections to a pod; more are closed. 4,096.
	PodTunnels int
	// PairTunnels bounds the tunnel connections of a pod to one peer, of one identity, while
	// they are busy: beyond, only streams that have no room make more. As many as there are
	// CPUs, 2 at least and 8 at most.
	PairTunnels int
	// NodeHandshakes bounds the TLS handshakes of tunnels from all pods that go on at one time,
	// and one pod has half of them; more wait. 64.
	NodeHandshakes int
	// PodBuffers and NodeBuffers bound the bytes of large copy buffers and of what tunnels
	// have received and nobody has read. Without the former a direction copies through a
	// small buffer; without the latter a stream has a small window, or is refused with 503.
	// 128 MiB and 512 MiB, or more where that many connections are allowed: the half that
	// windows do not grow into has room for the smallest stream of each.
	PodBuffers, NodeBuffers int64
	// PodActive and NodeActive bound the chunks that are moved at one time. Half the CPUs,
	// and as many as there are but 2 at least: a pod that uses all of its own leaves CPUs
	// to the others.
	PodActive, NodeActive int

	// lease is how long a turn may be held while others wait, before its holder counts as
	// blocked on its peer and the turn passes on.
	lease time.Duration
}

// Within sets what is not set of files, connections and tunnels to what a process can carry
// that may have so many open files: a quarter of them are for listeners, tunnels and all else.
// One pod gets half of the others unless its connections are set to more, so that it cannot
// use up the files of all.
func (l Limits) Within(files uint64) Limits {
	usable := int64(max(2, min(files, 1<<20)/4*3))
	if l.NodeFiles == 0 {
		l.NodeFiles = usable
	}
	if l.NodeConnections == 0 {
		l.NodeConnections = int(min(50_000, l.NodeFiles))
	}
	if l.PodFiles == 0 {
		l.PodFiles = min(l.NodeFiles, max(2, l.NodeFiles/2, int64(l.PodConnections)))
	}
	if l.PodConnections == 0 {
		l.PodConnections = min(10_000, max(1, l.NodeConnections/2))
	}
	if l.PodTunnels == 0 {
		l.PodTunnels = min(4096, max(1, int(usable/12))) // a quarter of what is not usable
	}
	return l
}

func (l Limits) withDefaults() Limits {
	set := func(value *int, fallback int) {
		if *value <= 0 {
			*value = fallback
		}
	}
	set(&l.PodConnections, 10_000)
	set(&l.NodeConnections, 50_000)
	set(&l.PodFlows, 16_384)
	if l.PodFiles <= 0 {
		l.PodFiles = math.MaxInt64
	}
	if l.NodeFiles <= 0 {
		l.NodeFiles = math.MaxInt64
	}
	set(&l.PodPending, 1024)
	set(&l.PodHandshakes, 64)
	set(&l.PodTunnels, 4096)
	cpus := min(runtime.NumCPU(), runtime.GOMAXPROCS(0)) // the latter knows of a cgroup's quota
	set(&l.PairTunnels, min(max(2, cpus), 8))
	set(&l.NodeHandshakes, 64)
	set(&l.PodActive, max(1, cpus/2))
	set(&l.NodeActive, max(2, cpus))
	if l.PodBuffers <= 0 {
		l.PodBuffers = max(128<<20, 2*h2.StreamFloor*int64(l.PodConnections))
	}
	if l.NodeBuffers <= 0 {
		l.NodeBuffers = max(512<<20, 2*h2.StreamFloor*int64(l.NodeConnections), l.PodBuffers)
	}
	if l.lease <= 0 {
		l.lease = 200 * time.Microsecond
	}
	return l
}

// Names of limits, as metric labels.
const (
	limitPodConnections  = "pod_connections"
	limitNodeConnections = "node_connections"
	limitPodFlows        = "pod_udp_flows"
	limitPodFiles        = "pod_files"
	limitNodeFiles       = "node_files"
	limitPodPending      = "pod_pending"
	limitPodTunnels      = "pod_tunnels"
	limitPodHandshakes   = "pod_handshakes"
	limitBuffers         = "buffers"
)

// limitLog counts each time that a limit bites and logs some of them.
type limitLog struct {
	log       *slog.Logger
	telemetry *telemetry.Telemetry
	mu        sync.Mutex
	last      map[[2]string]time.Time // by limit and pod
}

// limitLogPause is how long a limit of one pod stays silent in the log.
const limitLogPause = 10 * time.Second

func (l *limitLog) bit(limit, uid string, bound int64) {
	l.telemetry.LimitReached(limit)
	key := [2]string{limit, uid}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.last[key]) < limitLogPause {
		return
	}
	if l.last == nil || len(l.last) > 10_000 { // pods come and go; the log may repeat itself
		l.last = make(map[[2]string]time.Time)
	}
	l.last[key] = now
	l.log.Error("limit reached: what exceeds it is refused or slowed", "limit", limit, "bound", bound, "pod", uid)
}

// budget is an amount that may be taken up to a limit.
type budget struct {
	used  atomic.Int64
	limit int64
}

func (b *budget) take(n int64) bool { return b.takeBelow(n, b.limit) }

func (b *budget) takeBelow(n, limit int64) bool {
	if b.used.Add(n) <= limit {
		return true
	}
	b.used.Add(-n)
	return false
}

func (b *budget) give(n int64) { b.used.Add(-n) }
