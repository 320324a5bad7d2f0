package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// lateRevocation is trust that finds a peer revoked once the handshake with it is over, too
// early for the connection to be among those that are looked at when trust changes.
type lateRevocation struct{ Certificates }

func (lateRevocation) Revoked(tls.ConnectionState) error { return errors.New("serial 1") }

func TestTunnelToAPeerRevokedDuringTheDialIsNotUsed(t *testing.T) {
	w := newWorld(t)
	node := w.newNode("node1", func(c *Config) { c.Certs = lateRevocation{c.Certs} })
	pod := newFakePod(t, "web2", w.web.addr.Next().Next().Next().Next().String())
	w.publish(func(c *dataplane.Contents) {
		extra := pod.workload("node1")
		extra.ServiceAccount = "web"
		c.Workloads = append(c.Workloads, extra)
	})
	w.serve(node, pod)
	wantReset(t, w.dial(node, pod, w.listen(w.db.addr, echo)))
	f := node.event(t, admin.FlowDenied)
	if !strings.Contains(f.Cause, "revoked") || f.Flags != string(telemetry.FlagsDeny) {
		t.Errorf("flow record %+v", f)
	}
}

// rootless is trust that loses the root of every peer at some point.
type rootless struct {
	Certificates
	lost chan struct{}
}

func (r rootless) Changed() <-chan struct{} {
	select {
	case <-r.lost:
		return nil // no more changes
	default:
		return r.lost
	}
}

func (r rootless) Distrusted(tls.ConnectionState) error {
	select {
	case <-r.lost:
		return errors.New("no chain to a root")
	default:
		return nil
	}
}

// The accepting side retires tunnels; the side that opened them knows nothing of the change.
func TestTunnelOfARemovedRootTakesNoNewStreams(t *testing.T) {
	lost := make(chan struct{})
	w := newWorld(t, func(c *Config) {
		if c.Node == "node2" {
			c.Certs = rootless{c.Certs, lost}
		}
	})
	target := w.listen(w.db.addr, echo)
	open := w.dial(w.nodes[0], w.web, target)
	echoes(t, open)
	dials := func() uint64 { return w.nodes[0].all()[0].client.Stats().Dials }
	echoes(t, w.dial(w.nodes[0], w.web, target))
	if got := dials(); got != 1 {
		t.Fatalf("%d sessions were made for two streams, want 1", got)
	}
	close(lost)
	eventually(t, "new streams take another session", func() bool {
		c := w.dial(w.nodes[0], w.web, target)
		echoes(t, c)
		_ = c.Close() // many streams at once would take another session as well
		return dials() == 2
	})
	echoes(t, open)
}

// echoes proves that an echo server answers at the other end.
func echoes(t *testing.T, c *net.TCPConn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4)
	if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "echo" {
		t.Fatalf("answer %q, %v", answer, err)
	}
}
