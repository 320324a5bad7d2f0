package proxy

import (
	"testing"

	"github.com/raceway-mesh/raceway/hbone/h2"
)

func TestDefaultLimitsFitTheOpenFiles(t *testing.T) {
	for _, test := range []struct {
		name      string
		files     uint64
		set       Limits
		pod, node int
	}{
		{"plenty", 1 << 20, Limits{}, 10_000, 50_000},
		{"no limit at all", ^uint64(0), Limits{}, 10_000, 50_000},
		{"a pod must leave half to the others", 20_000, Limits{}, 7500, 15_000},
		{"hardly any", 1, Limits{}, 1, 2},
		{"what is set stays", 20_000, Limits{PodConnections: 6000, NodeConnections: 9000}, 6000, 9000},
		{"a node's bound that is set bounds its pods", 20_000, Limits{NodeConnections: 100}, 50, 100},
	} {
		l := test.set.Within(test.files)
		if l.PodConnections != test.pod || l.NodeConnections != test.node {
			t.Errorf("%s: %d connections of a pod and %d of the node, want %d and %d", test.name, l.PodConnections, l.NodeConnections, test.pod, test.node)
		}
	}
}

func TestOnePodCannotTakeAllFiles(t *testing.T) {
	for _, test := range []struct {
		name      string
		set       Limits
		pod, node int64
	}{
		{"half", Limits{}, 7500, 15_000},
		{"unless the operator says so", Limits{PodConnections: 12_000}, 12_000, 15_000},
		{"which cannot be more than there are", Limits{PodConnections: 40_000}, 15_000, 15_000},
	} {
		l := test.set.Within(20_000)
		if l.PodFiles != test.pod || l.NodeFiles != test.node {
			t.Errorf("%s: %d files of a pod and %d of the node, want %d and %d", test.name, l.PodFiles, l.NodeFiles, test.pod, test.node)
		}
		if l.PodTunnels != 1250 {
			t.Errorf("%s: %d tunnels", test.name, l.PodTunnels)
		}
	}
}

// Idle streams keep what their windows have grown to, which is half of the budget at most.
func TestBuffersHaveRoomForEveryConnection(t *testing.T) {
	for _, set := range []Limits{{}, {PodConnections: 15_000}, {PodConnections: 100_000, NodeConnections: 100_000}} {
		l := set.withDefaults()
		for name, test := range map[string]struct{ buffers, conns int64 }{
			"pod": {l.PodBuffers, int64(l.PodConnections)}, "node": {l.NodeBuffers, int64(l.NodeConnections)},
		} {
			if need := test.conns * h2.StreamFloor; need > test.buffers/2 {
				t.Errorf("%s: %d streams take %d bytes of %d", name, test.conns, need, test.buffers)
			}
		}
	}
}
