package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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
	asked   atomic.Int64
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
			err := askUDP(p.web, p.db.AddrPort(portEcho), fmt.Sprint("question ", i.asked.Load()), patience)
			for errors.Is(err, syscall.ECONNREFUSED) && time.Since(began) < patience { // an agent is dead
				time.Sleep(20 * time.Millisecond)
				err = askUDP(p.web, p.db.AddrPort(portEcho), fmt.Sprint("question ", i.asked.Load()), patience)
			}
			if err != nil {
				i.failed = append(i.failed, err)
			}
			i.asked.Add(1)
			i.longest = max(i.longest, time.Since(began))
		}
	})
	return i
}

// settle waits until a question was answered that was asked from now on.
func (i *interrogation) settle() {
	for soon := i.asked.Load() + 2; i.asked.Load() < soon; {
		time.Sleep(5 * time.Millisecond)
	}
}

// spared wants that every question was answered, at the latest when it was asked again. For as long
// as dead there was an agent that could not.
func (i *interrogation) spared(t *testing.T, dead time.Duration) {
	t.Helper()
	close(i.stop)
	i.ended.Wait()
	for _, err := range i.failed {
		t.Error("a question was not answered:", err)
	}
	if i.longest > dead+5*time.Second { // what resolvers wait for a name server
		t.Errorf("an answer took %v, where agents were dead for %v", i.longest, dead)
	}
	t.Logf("%d questions, the longest took %v", i.asked.Load(), i.longest)
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
		program := filepath.Join(binDir, "raceway-agent")
		asking := interrogate(p)
		for _, n := range p.Nodes() {
			p.replace(n, program, 0, "--udp=true")
		}
		awaitUDP(t, p.cluster, p.web, p.db.AddrPort(portEcho))
		asking.settle() // what goes in clear is answered in clear
		if err := p.link.Reset(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, n := range p.Nodes() {
			p.replace(n, program, 0)
		}
		killed := time.Now()
		for _, n := range slices.Backward(p.Nodes()) {
			if err := p.Agent(n).Kill(); err != nil {
				t.Fatal(err)
			}
			if _, err := p.Agent(n).Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		dead := time.Since(killed)
		awaitUDP(t, p.cluster, p.web, p.db.AddrPort(portEcho))
		if p.readable([]byte("question"))() {
			t.Error("UDP is readable on the link while agents that take it follow each other")
		}
		for _, n := range p.Nodes() {
			p.replace(n, program, 0, "--udp=false")
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
		asking.spared(t, dead)
		for _, n := range p.Nodes() {
			checkAgent(t, p.Agent(n))
		}
	})
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
