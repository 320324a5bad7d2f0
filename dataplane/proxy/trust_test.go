package proxy

import (
	"crypto/tls"
	"errors"
	"strings"
	"testing"

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
