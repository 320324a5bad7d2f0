package lab_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

func TestTheRealProcessesServeTheLab(t *testing.T) {
	l := labtest.New(t, lab.Options{BinDir: labtest.Build(t, "raceway-agent", "raceway-ca")})
	server, client := addPod(t, l, "server", 1), addPod(t, l, "client", 2)
	serveEcho(t, server.Host)
	if err := l.StartMesh(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := capture(t, l, 1)
	plain := nonce()
	ask(t, client.Host, server.AddrPort(7), plain)
	if !contains(t, c, plain) || countPort(t, c, 15008) != 0 {
		t.Error("before the label the link must carry plain text and no tunnel")
	}
	if err := l.LabelNamespace("shop", dataplane.ModeAmbient); err != nil {
		t.Fatal(err)
	}
	waitCaptured(t, l, server, client)
	hidden := nonce()
	if answer, _ := ask(t, client.Host, server.AddrPort(7), hidden); string(answer) != string(hidden) {
		t.Errorf("through the mesh came %q for %q", answer, hidden)
	}
	if contains(t, c, hidden) || countPort(t, c, 15008) == 0 {
		t.Error("after the label the link must carry a tunnel and no plain text")
	}
	metrics, err := l.Agent(server.Node).Metrics(t.Context())
	if err != nil || !strings.Contains(metrics, "istio_tcp_connections_opened_total") {
		t.Errorf("metrics, %v:\n%s", err, metrics)
	}
	restartKilled(t, l, server, client)
}

// restartKilled kills one agent: what it pinned must show until Close, and the next one take over.
func restartKilled(t *testing.T, l *lab.Lab, server, client *lab.Pod) {
	t.Helper()
	agent := l.Agent(server.Node)
	if _, err := l.StartAgent(t.Context(), server.Node); err == nil {
		t.Error("a second agent started on the node")
	}
	if err := agent.Kill(); err != nil {
		t.Fatal(err)
	}
	if pins := strings.Join(l.Pins(), "\n"); !strings.Contains(pins, agent.BPFDir) {
		t.Errorf("a killed agent leaves its pins, there are:\n%s", pins)
	}
	if _, err := agent.Metrics(t.Context()); err == nil {
		t.Error("a killed agent has metrics")
	}
	agent, err := agent.Restart(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	waitCaptured(t, l, server, client)
	if answer, _ := ask(t, client.Host, server.AddrPort(7), []byte("again")); string(answer) != "again" {
		t.Errorf("after the restart came %q", answer)
	}
	if err := l.CA().Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.StartCA(t.Context()); err != nil {
		t.Errorf("start the CA again: %v", err)
	}
	if u, err := agent.Usage(); err != nil || u.RSS == 0 || u.User+u.System == 0 {
		t.Errorf("usage %+v, %v", u, err)
	}
}

func waitCaptured(t *testing.T, l *lab.Lab, pods ...*lab.Pod) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := l.WaitCapture(ctx, dataplane.CaptureInForce, pods...); err != nil {
		t.Fatal(err)
	}
	if err := l.WaitProtocol(ctx, dataplane.ProtocolHBONE, pods...); err != nil {
		t.Fatal(err)
	}
}
