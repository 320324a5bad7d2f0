package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// interrogation asks db by UDP until it is stopped, each time from a socket of its own.
type interrogation struct {
	stop    chan struct{}
	ended   sync.WaitGroup
	asked   int
	longest time.Duration
	failed  []error
}

func interrogate(p *udpPair) *interrogation {
	i := &interrogation{stop: make(chan struct{})}
	i.ended.Go(func() {
		for {
			select {
			case <-i.stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			began := time.Now()
			err := askUDP(p.web, p.db.AddrPort(portEcho), fmt.Sprint("question ", i.asked), patience)
			for errors.Is(err, syscall.ECONNREFUSED) && time.Since(began) < patience { // an agent is dead
				time.Sleep(20 * time.Millisecond)
				err = askUDP(p.web, p.db.AddrPort(portEcho), fmt.Sprint("question ", i.asked), patience)
			}
			if err != nil {
				i.failed = append(i.failed, err)
			}
			i.asked++
			i.longest = max(i.longest, time.Since(began))
		}
	})
	return i
}

// spared wants that every question was answered, at the latest when it was asked again.
func (i *interrogation) spared(t *testing.T) {
	t.Helper()
	close(i.stop)
	i.ended.Wait()
	for _, err := range i.failed {
		t.Error("a question was not answered:", err)
	}
	if i.longest > 5*time.Second { // what resolvers wait for a name server
		t.Errorf("an answer took %v", i.longest)
	}
	t.Logf("%d questions, the longest took %v", i.asked, i.longest)
}

// Agents that leave UDP alone are followed by such that take it, by those of its own kind, and by
// such that leave it alone again, under load: pods that are captured already get it and lose it,
// what the last two kinds of agents carry never leaves in clear, and every question is answered.
func TestUDPComesAndGoesWithItsAgents(t *testing.T) {
	eachFamilyInFull(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil, "--udp=false", "--drain-timeout=1s")
		p.enrol(p.web, p.db)
		if flows := udpFlows(t, p.cluster, p.Node(1)); len(flows) > 0 {
			t.Errorf("UDP is captured: %v", flows)
		}
		asking := interrogate(p)
		for _, n := range p.Nodes() {
			p.succeed(n, "--udp=true")
		}
		awaitUDP(t, p.cluster, p.web, p.db.AddrPort(portEcho))
		if err := p.link.Reset(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, n := range p.Nodes() {
			p.succeed(n)
		}
		for _, n := range slices.Backward(p.Nodes()) {
			if err := p.Agent(n).Kill(); err != nil {
				t.Fatal(err)
			}
			if _, err := p.Agent(n).Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		awaitUDP(t, p.cluster, p.web, p.db.AddrPort(portEcho))
		if p.readable([]byte("question"))() {
			t.Error("UDP is readable on the link while agents that take it follow each other")
		}
		for _, n := range p.Nodes() {
			p.succeed(n, "--udp=false")
		}
		eventually(t, "UDP in clear", func() error {
			if err := askUDP(p.web, p.db.AddrPort(portEcho), "at last", patience); err != nil {
				return err
			}
			if !p.readable([]byte("at last"))() {
				return fmt.Errorf("it is not on the link")
			}
			return nil
		})
		asking.spared(t)
		for _, n := range p.Nodes() {
			checkAgent(t, p.Agent(n))
		}
	})
}

// succeed has another agent take n over, and ends the one before it.
func (p *udpPair) succeed(n *lab.Node, args ...string) {
	p.t.Helper()
	old := p.Agent(n)
	successor, err := old.Succeed(filepath.Join(binDir, "raceway-agent"), args...)
	if err == nil {
		err = successor.AwaitSuccession(p.t.Context())
	}
	if err == nil {
		err = old.Signal(syscall.SIGTERM)
	}
	if err == nil {
		err = old.Wait(p.t.Context())
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *udpPair) ask(payload string) {
	p.t.Helper()
	if err := askUDP(p.web, p.db.AddrPort(portEcho), payload, patience); err != nil {
		p.t.Errorf("ask %q: %v", payload, err)
	}
}

// Where UDP cannot be captured all else is: UDP goes in clear, but for what must not, and
// `raceway check` says why.
func TestAgentThatCannotCaptureUDPSaysSo(t *testing.T) {
	p := newUDPPair(t, lab.Options{}, nil, "--inbound", "tc")
	if err := p.AddNamespace("vault", map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient, dataplane.UDPLabel: string(dataplane.UDPRequire)}); err != nil {
		t.Fatal(err)
	}
	vault := p.podIn("vault", "vault", 1)
	p.enrol(p.web, p.db, vault)
	p.ask("in clear")
	if !p.readable([]byte("in clear"))() {
		t.Error("UDP is not in clear")
	}
	if err := askUDP(vault, p.db.AddrPort(portEcho), "not in clear", 300*time.Millisecond); err == nil || p.readable([]byte("not in clear"))() {
		t.Errorf("UDP of a pod that requires tunnels left without: %v", err)
	}
	client := p.Agent(p.Node(1)).Client()
	defer client.Close()
	findings, err := client.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []admin.Finding{
		{Subject: "agent", Check: "udp", OK: true, Detail: "goes in clear: it needs SK_LOOKUP"},
		{Subject: "agent", Check: "udp", Detail: "namespace vault requires tunnels"},
	} {
		if !slices.ContainsFunc(findings, func(f admin.Finding) bool {
			return f.Subject == want.Subject && f.Check == want.Check && f.OK == want.OK && strings.Contains(f.Detail, want.Detail)
		}) {
			t.Errorf("no finding is %+v", want)
		}
	}
	for _, f := range findings {
		if !f.OK && f.Check != "udp" {
			t.Errorf("%s: %s: %s", f.Subject, f.Check, f.Detail)
		}
	}
}
