package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// patience is how long a test waits for what must come. It is generous: nothing here asserts
// speed, and a busy machine with the race detector is slow.
const patience = 45 * time.Second

// eventually repeats probe until it returns nil.
func eventually(t *testing.T, what string, probe func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := probe()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// podIn adds a pod of another namespace, which has no label.
func (c *cluster) podIn(namespace, name string, node int) *lab.Pod {
	c.t.Helper()
	p, err := c.AddPod(lab.PodSpec{Namespace: namespace, Name: name, Node: node, ServiceAccount: name})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// enrol labels namespace "shop" and waits until pods are captured and everybody knows.
func (c *cluster) enrol(pods ...*lab.Pod) {
	c.t.Helper()
	if err := c.LabelNamespace("shop", dataplane.ModeAmbient); err != nil {
		c.t.Fatal(err)
	}
	c.awaitState(dataplane.CaptureInForce, pods...)
	c.awaitWay(dataplane.ProtocolHBONE, pods...)
}

func (c *cluster) awaitState(state dataplane.CaptureState, pods ...*lab.Pod) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	if err := c.WaitCapture(ctx, state, pods...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) awaitWay(protocol dataplane.Protocol, pods ...*lab.Pod) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	if err := c.WaitProtocol(ctx, protocol, pods...); err != nil {
		c.t.Fatal(err)
	}
}

// apply writes a file of the cluster.
func (c *cluster) apply(name, content string) {
	c.t.Helper()
	if err := c.ApplyFile(name, content); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) agent(node int) *lab.Agent { return c.Agent(c.Node(node)) }

// client asks the agent of a node.
func (c *cluster) client(node int) *admin.Client {
	client := c.agent(node).Client()
	c.t.Cleanup(client.Close)
	return client
}

// workload is p as the agent of its node sees it.
func (c *cluster) workload(p *lab.Pod) (admin.Workload, error) {
	client := c.Agent(p.Node).Client()
	defer client.Close()
	workloads, err := client.Workloads(c.t.Context())
	if err != nil {
		return admin.Workload{}, err
	}
	for _, w := range workloads {
		if w.Namespace == p.Name.Namespace && w.Name == p.Name.Name {
			return w, nil
		}
	}
	return admin.Workload{}, fmt.Errorf("%s is not known to %s", p, p.Node.Name)
}

// flows are the flow records that the agent of a node remembers.
func (c *cluster) flows(node int) []admin.Flow {
	c.t.Helper()
	client := c.agent(node).Client()
	defer client.Close()
	var all []admin.Flow
	err := client.Flows(c.t.Context(), false, func(f admin.Flow) error {
		all = append(all, f)
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return all
}

// flow finds a remembered record.
func (c *cluster) flow(node int, what string, match func(admin.Flow) bool) admin.Flow {
	c.t.Helper()
	var found admin.Flow
	eventually(c.t, "flow record of "+what, func() error {
		flows := c.flows(node)
		for _, f := range flows {
			if match(f) {
				found = f
				return nil
			}
		}
		return fmt.Errorf("not among %d records: %+v", len(flows), flows[max(0, len(flows)-3):])
	})
	return found
}

// samples are the metrics of one scrape.
type samples []sample

type sample struct {
	name   string
	labels map[string]string
	value  float64
}

var (
	sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$`)
	labelPair  = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"`)
)

// scrape reads the metrics of a node's agent.
func (c *cluster) scrape(node int) samples {
	c.t.Helper()
	text, err := c.agent(node).Metrics(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	var all samples
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			c.t.Fatalf("no metric: %q", line)
		}
		value, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			c.t.Fatalf("%q: %v", line, err)
		}
		s := sample{name: m[1], labels: make(map[string]string), value: value}
		for _, pair := range labelPair.FindAllStringSubmatch(m[2], -1) {
			s.labels[pair[1]] = pair[2]
		}
		all = append(all, s)
	}
	return all
}

// sum adds up the samples of a name that have the given labels: name, value, name, value.
func (s samples) sum(name string, labels ...string) float64 {
	sum := 0.0
next:
	for _, one := range s {
		if one.name != name {
			continue
		}
		for i := 0; i < len(labels); i += 2 {
			if one.labels[labels[i]] != labels[i+1] {
				continue next
			}
		}
		sum += one.value
	}
	return sum
}

// isReset reports whether err is how an application sees that its connection was broken off,
// and not that it ended.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ECONNREFUSED) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN) // after a reset that nobody read
}

// refused wants that a connection does not come up, or is reset before a byte arrives; a
// clean end is as wrong as an answer.
func refused(from *lab.Pod, to netip.AddrPort) error {
	conn, err := plug(from, to)
	if err != nil {
		if !isReset(err) {
			return fmt.Errorf("connect: %w, want a reset", err)
		}
		return nil
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = conn.Write([]byte("is anybody there?"))
	if err == nil {
		var n int
		if n, err = conn.Read(make([]byte, 64)); n > 0 {
			return fmt.Errorf("%d bytes were answered", n)
		}
	}
	if !isReset(err) {
		return fmt.Errorf("it ended with %w, want a reset", err)
	}
	return nil
}

// logged waits for a line in the agent's log that has all words.
func logged(t *testing.T, a *lab.Agent, words ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("line with %q in the log of %s", words, a.Node.Name), func() error {
		content, err := os.ReadFile(a.Log)
		if err != nil {
			return err
		}
	next:
		for line := range strings.Lines(string(content)) {
			for _, word := range words {
				if !strings.Contains(line, word) {
					continue next
				}
			}
			return nil
		}
		return errors.New("no such line")
	})
}
