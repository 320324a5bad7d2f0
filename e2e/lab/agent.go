package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

const (
	caPort = 15012
	// startTimeout is for a process to answer after its start: an agent loads its programs
	// first, and on a small machine built with -race that takes seconds.
	startTimeout = 30 * time.Second
	// pollInterval is between two questions of a wait.
	pollInterval = 20 * time.Millisecond
)

// metricsAddr is the same on every node: each has a loopback of its own.
var metricsAddr = netip.MustParseAddrPort("127.0.0.1:15020")

// writeTokens makes one secret per node for its agent, and the file that tells the CA whose
// they are.
func (l *Lab) writeTokens() error {
	tokens := make(map[string]string, len(l.nodes))
	for _, n := range l.nodes {
		var b [24]byte
		_, _ = rand.Read(b[:]) // never fails, see crypto/rand
		tokens[n.Name] = hex.EncodeToString(b[:])
		if err := l.writeAtomically(l.tokenFile(n), []byte(tokens[n.Name]+"\n"), 0o600); err != nil {
			return err
		}
	}
	content, err := yaml.Marshal(tokens)
	if err != nil {
		return fmt.Errorf("write the nodes' tokens: %w", err)
	}
	return l.writeAtomically(l.tokensFile(), content, 0o600)
}

func (l *Lab) tokenFile(n *Node) string { return filepath.Join(l.secretDir(), n.Name+".token") }
func (l *Lab) tokensFile() string       { return filepath.Join(l.secretDir(), "tokens.yaml") }

// CA is the running certificate authority.
type CA struct {
	*Process
	Addr     netip.AddrPort
	DataDir  string // its keys; kept over restarts
	RootFile string // what agents verify it against
}

// StartCA starts raceway-ca on Control with args after the lab's own, or again after it ended,
// and waits until it listens.
func (l *Lab) StartCA(ctx context.Context, args ...string) (*CA, error) {
	data := filepath.Join(l.secretDir(), "ca")
	ca := &CA{
		Addr:     l.control.AddrPort(caPort),
		DataDir:  data,
		RootFile: filepath.Join(data, "root-cert.pem"),
	}
	cmd := exec.Command(filepath.Join(l.opts.BinDir, "raceway-ca"), append([]string{
		"--listen", ca.Addr.String(),
		"--data-dir", ca.DataDir,
		"--cluster-dir", l.ClusterDir(),
		"--node-tokens", l.tokensFile(),
		"--trust-domain", l.opts.TrustDomain,
		"--tls-name", ca.Addr.Addr().String(),
	}, args...)...)
	p, err := l.control.start(cmd, caProcess, "raceway-ca.log")
	if err != nil {
		return nil, err
	}
	ca.Process = p
	err = p.ready(ctx, func(ctx context.Context) error {
		if _, err := os.Stat(ca.RootFile); err != nil {
			return err
		}
		conn, err := l.control.Dial(ctx, ca.Addr)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ca = ca
	return ca, nil
}

// Agent is a running raceway-agent.
type Agent struct {
	*Process
	Node   *Node
	Socket string // of the admin API
	BPFDir string // of its pins; they outlive the process

	args []string
}

// StartAgent starts raceway-agent on n with args after the lab's own, or again after it
// ended, and waits until its admin socket answers. The CA must have been started once.
func (l *Lab) StartAgent(ctx context.Context, n *Node, args ...string) (*Agent, error) {
	l.mu.Lock()
	ca, running := l.ca, l.agents[n.Name]
	l.mu.Unlock()
	if ca == nil {
		return nil, fmt.Errorf("start raceway-agent on %s: start the CA first, agents need its root", n.Name)
	}
	if running != nil && running.Running() {
		return nil, fmt.Errorf("start raceway-agent on %s: it runs as pid %d", n.Name, running.Pid())
	}
	a, err := l.launchAgent(n, ca, filepath.Join(l.opts.BinDir, "raceway-agent"), args)
	if err != nil {
		return nil, err
	}
	client := a.Client()
	defer client.Close()
	err = a.ready(ctx, func(ctx context.Context) error {
		_, err := client.Version(ctx)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, a.Kill())
	}
	l.setAgent(a)
	return a, nil
}

func (l *Lab) setAgent(a *Agent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.agents[a.Node.Name] = a
}

// Succeed starts another agent of that program on a's node while a runs, with args after those of
// a. It is the node's agent once AwaitSuccession says so.
func (a *Agent) Succeed(program string, args ...string) (*Agent, error) {
	l := a.Host.lab
	return l.launchAgent(a.Node, l.CA(), program, slices.Concat(a.args, args))
}

// AwaitSuccession waits until a has its node, and says that it is ready.
func (a *Agent) AwaitSuccession(ctx context.Context) error {
	err := a.ready(ctx, func(ctx context.Context) error {
		pid, err := listenerOf(ctx, a.Socket)
		if err == nil && pid != a.Pid() {
			err = fmt.Errorf("process %d has the admin socket, not %d", pid, a.Pid())
		}
		if err != nil {
			return err
		}
		_, err = a.get(ctx, "/readyz")
		return err
	})
	if err == nil {
		a.Host.lab.setAgent(a)
	}
	return err
}

// listenerOf tells which process listens on a unix socket.
func listenerOf(ctx context.Context, path string) (pid int, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return int(cred.Pid), nil
}

func (l *Lab) launchAgent(n *Node, ca *CA, program string, args []string) (*Agent, error) {
	a := &Agent{
		Node:   n,
		Socket: filepath.Join(l.dir, n.Name+".sock"),
		BPFDir: filepath.Join(l.bpfDir(), l.opts.Name+"-"+n.Name),
		args:   slices.Clone(args),
	}
	cmd := exec.Command(program, append([]string{
		"--node", n.Name,
		"--cluster-dir", l.ClusterDir(),
		"--status-dir", l.StatusDir(),
		"--ca-address", ca.Addr.String(),
		"--ca-root", ca.RootFile,
		"--ca-token-file", l.tokenFile(n),
		"--trust-domain", l.opts.TrustDomain,
		"--root-namespace", l.opts.RootNamespace,
		"--socket", a.Socket,
		"--bpf-dir", a.BPFDir,
		"--state-dir", filepath.Join(l.dir, n.Name+".state"),
		"--metrics-address", metricsAddr.String(),
	}, args...)...)
	p, err := n.start(cmd, agentProcess, "raceway-agent-"+n.Name+".log")
	if err != nil {
		return nil, err
	}
	a.Process = p
	return a, nil
}

// StartMesh starts the CA and an agent on every node, all with args.
func (l *Lab) StartMesh(ctx context.Context, args ...string) error {
	if _, err := l.StartCA(ctx); err != nil {
		return err
	}
	for _, n := range l.nodes {
		if _, err := l.StartAgent(ctx, n, args...); err != nil {
			return err
		}
	}
	return nil
}

// Agent returns the agent that was started last on n, or nil.
func (l *Lab) Agent(n *Node) *Agent {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.agents[n.Name]
}

// CA returns the CA that was started last, or nil.
func (l *Lab) CA() *CA {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ca
}

// Restart starts the agent again with the same arguments after Kill or Stop.
func (a *Agent) Restart(ctx context.Context) (*Agent, error) {
	return a.Host.lab.StartAgent(ctx, a.Node, a.args...)
}

// Client asks the agent's admin API. The caller closes it.
func (a *Agent) Client() *admin.Client { return admin.NewClient(a.Socket) }

// Metrics is what the agent's metrics endpoint says, in Prometheus' text format.
func (a *Agent) Metrics(ctx context.Context) (string, error) { return a.get(ctx, "/metrics") }

// get asks the metrics endpoint.
func (a *Agent) get(ctx context.Context, path string) (string, error) {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return a.Host.Dial(ctx, metricsAddr)
		},
		DisableKeepAlives: true,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddr.String()+path, nil)
	if err != nil {
		return "", fmt.Errorf("get %s of %s: %w", path, a.Node.Name, err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return "", fmt.Errorf("get %s of %s: %w", path, a.Node.Name, err)
	}
	body, err := io.ReadAll(resp.Body)
	err = errors.Join(err, resp.Body.Close())
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err != nil {
		return "", fmt.Errorf("get %s of %s: %w", path, a.Node.Name, err)
	}
	return string(body), nil
}

// Running reports whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// ready waits until probe succeeds. A process that ends first, or does not get ready in
// time, is an error with the end of its log.
func (p *Process) ready(ctx context.Context, probe func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not within %v", startTimeout))
	defer cancel()
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("start %s: it ended at once (%w)%s", p.command, p.err, p.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("start %s: it does not answer: %w: %w%s", p.command, context.Cause(ctx), err, p.LogTail())
		case <-time.After(pollInterval):
		}
	}
}

// LogTail is the end of the process's log, to go behind an error; "" when there is none.
func (p *Process) LogTail() string {
	const lines = 12
	content, err := os.ReadFile(p.Log)
	if err != nil || len(content) == 0 {
		return ""
	}
	all := strings.Split(strings.TrimSpace(string(content)), "\n")
	return "; its log ends with:\n\t" + strings.Join(all[max(0, len(all)-lines):], "\n\t")
}

// WaitCapture waits until the agent of each pod says that the pod is in that state. A pod
// whose capture failed is reported with its agent's reason when ctx ends.
func (l *Lab) WaitCapture(ctx context.Context, state dataplane.CaptureState, pods ...*Pod) error {
	for _, p := range pods {
		agent := l.Agent(p.Node)
		if agent == nil {
			return fmt.Errorf("wait for %s: no agent was started on %s", p, p.Node.Name)
		}
		client := agent.Client()
		err := poll(ctx, func(ctx context.Context) error { return captureIs(ctx, client, p, state) })
		client.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func captureIs(ctx context.Context, client *admin.Client, p *Pod, want dataplane.CaptureState) error {
	workloads, err := client.Workloads(ctx)
	if err != nil {
		return err
	}
	for _, w := range workloads {
		if w.Namespace == p.Name.Namespace && w.Name == p.Name.Name {
			if w.Capture == want {
				return nil
			}
			return fmt.Errorf("%s is %s (%s), not %s", p, w.Capture, w.Reason, want)
		}
	}
	return fmt.Errorf("%s does not know %s", p.Node.Name, p)
}

// WaitProtocol waits until every agent that runs reaches each pod by that protocol.
func (l *Lab) WaitProtocol(ctx context.Context, protocol dataplane.Protocol, pods ...*Pod) error {
	for _, n := range l.nodes {
		agent := l.Agent(n)
		if agent == nil || !agent.Running() {
			continue
		}
		client := agent.Client()
		err := poll(ctx, func(ctx context.Context) error { return protocolIs(ctx, client, protocol, pods) })
		client.Close()
		if err != nil {
			return fmt.Errorf("as %s sees it: %w", n.Name, err)
		}
	}
	return nil
}

func protocolIs(ctx context.Context, client *admin.Client, want dataplane.Protocol, pods []*Pod) error {
	workloads, err := client.Workloads(ctx)
	if err != nil {
		return err
	}
	seen := make(map[dataplane.Name]dataplane.Protocol, len(workloads))
	for _, w := range workloads {
		seen[dataplane.Name{Namespace: w.Namespace, Name: w.Name}] = w.Protocol
	}
	for _, p := range pods {
		if seen[p.Name] != want {
			return fmt.Errorf("%s is reached by %q, not %s", p, seen[p.Name], want)
		}
	}
	return nil
}

// poll repeats probe until it succeeds or ctx ends, and then returns its last complaint.
func poll(ctx context.Context, probe func(context.Context) error) error {
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

// UDPFlows lists the flows of UDP that the agent carries.
func (a *Agent) UDPFlows(ctx context.Context) ([]admin.Connection, error) {
	client := a.Client()
	defer client.Close()
	all, err := client.Connections(ctx)
	return slices.DeleteFunc(all, func(c admin.Connection) bool { return c.Protocol != dataplane.ProtocolHBONEUDP }), err
}
