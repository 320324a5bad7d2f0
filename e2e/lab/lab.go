package lab

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/e2e/space"
)

// runDir holds one directory per lab. It is short: unix socket paths are limited to 107 bytes.
const runDir = "/run/raceway-lab"

// agentRunDir is where an agent keeps what releasing its pods needs to know, in a directory
// named as that of its pins. Ours are therefore named after the lab and the node.
const agentRunDir = "/run/raceway"

// Options says what cluster to make. The zero value is two nodes on IPv4 without processes.
type Options struct {
	// Name is the prefix of everything that the lab makes; default "rw" and five random
	// characters. At most 16 characters.
	Name string
	// Nodes is how many; default 2, at most 250.
	Nodes int
	// IPv6 makes pods and services IPv6. With DualStack they have both families, IPv6 first.
	IPv6 bool
	// DualStack gives pods and services both families, IPv4 first unless IPv6 is set.
	DualStack bool
	// BinDir holds raceway-agent and raceway-ca; default the directory of this executable.
	BinDir string
	// TrustDomain of the mesh; default cluster.local.
	TrustDomain string
	// RootNamespace is where mesh-wide policies live; default istio-system.
	RootNamespace string
	// Keep leaves the processes running when this one ends without Close; otherwise the
	// kernel kills them with it.
	Keep bool
	// Log tells what the lab does; default nothing.
	Log *slog.Logger
}

func (o Options) withDefaults() (Options, error) {
	if o.Name == "" {
		o.Name = "rw" + randomSuffix()
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.BinDir == "" {
		self, err := os.Executable()
		if err != nil {
			return o, fmt.Errorf("find own executable: %w", err)
		}
		o.BinDir = filepath.Dir(self)
	}
	if o.TrustDomain == "" {
		o.TrustDomain = "cluster.local"
	}
	if o.RootNamespace == "" {
		o.RootNamespace = "istio-system"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Validate reports everything that is wrong with the options.
func (o Options) Validate() error {
	var errs []error
	if len(o.Name) > 16 || strings.ContainsAny(o.Name, "/ ") {
		errs = append(errs, fmt.Errorf("lab name %q: want at most 16 characters without slash or space", o.Name))
	}
	if o.Nodes < 0 || o.Nodes > maxNodes {
		errs = append(errs, fmt.Errorf("%d nodes: want 1 to %d", o.Nodes, maxNodes))
	}
	return errors.Join(errs...)
}

// families are the address families of pods and services, the primary one first.
func (o Options) families() []plan {
	switch {
	case o.DualStack && o.IPv6:
		return []plan{plan6, plan4}
	case o.DualStack:
		return []plan{plan4, plan6}
	case o.IPv6:
		return []plan{plan6}
	}
	return []plan{plan4}
}

// Lab is a cluster that stands until Close. Its methods may be called concurrently.
type Lab struct {
	opts    Options
	dir     string
	fabric  *Host
	control *Host
	nodes   []*Node

	mu         sync.Mutex
	spaces     []*space.Space // in the order of their making
	processes  []*Process
	captures   []*Capture
	namespaces map[string]map[string]string // labels by namespace
	pods       []*Pod
	services   []*Service
	nextVIP    int
	ca         *CA
	agents     map[string]*Agent
	closed     bool

	closing  sync.Once
	closeErr error
}

// New makes the directory, the fabric and the nodes. Nothing runs yet: see StartCA and
// StartAgent. It needs root, and says so.
func New(ctx context.Context, opts Options) (_ *Lab, err error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("make a lab: network namespaces need root: run this with sudo")
	}
	opts, err = opts.withDefaults()
	if err != nil {
		return nil, err
	}
	l := &Lab{
		opts:       opts,
		dir:        filepath.Join(runDir, opts.Name),
		namespaces: make(map[string]map[string]string),
		agents:     make(map[string]*Agent),
	}
	if err := l.makeDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if err := l.makeNetwork(ctx); err != nil {
		return nil, err
	}
	if err := l.writeTokens(); err != nil {
		return nil, err
	}
	for _, n := range l.nodes {
		if err := l.writeNode(n); err != nil {
			return nil, err
		}
	}
	opts.Log.Debug("lab is up", "name", opts.Name, "nodes", opts.Nodes, "dir", l.dir)
	return l, nil
}

// makeDir refuses a name that is in use: Close would end the other lab.
func (l *Lab) makeDir() (err error) {
	for {
		if err := os.MkdirAll(runDir, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", runDir, err)
		}
		err := os.Mkdir(l.dir, 0o755)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) { // or else the last other lab has just gone
			return fmt.Errorf("make the lab's directory: %w", err)
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeDir(l.dir))
		}
	}()
	for _, d := range []string{l.ClusterDir(), l.StatusDir(), l.tmpDir(), l.logDir(), l.secretDir(), l.bpfDir()} {
		mode := os.FileMode(0o755)
		if d == l.secretDir() {
			mode = 0o700
		}
		if err := os.Mkdir(d, mode); err != nil {
			return fmt.Errorf("make the lab's directory: %w", err)
		}
	}
	if err := unix.Mount("raceway-lab", l.bpfDir(), "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs on %s: %w", l.bpfDir(), err)
	}
	return l.writeOwner()
}

// Name is the prefix of everything that the lab made.
func (l *Lab) Name() string { return l.opts.Name }

// Dir holds everything of the lab: cluster state, sockets, logs, secrets, pins.
func (l *Lab) Dir() string { return l.dir }

// ClusterDir holds the cluster's Kubernetes YAML.
func (l *Lab) ClusterDir() string { return filepath.Join(l.dir, "cluster") }

// StatusDir is where agents publish which pods they captured.
func (l *Lab) StatusDir() string { return filepath.Join(l.dir, "status") }

func (l *Lab) tmpDir() string    { return filepath.Join(l.dir, "tmp") }
func (l *Lab) logDir() string    { return filepath.Join(l.dir, "log") }
func (l *Lab) secretDir() string { return filepath.Join(l.dir, "secret") }
func (l *Lab) bpfDir() string    { return filepath.Join(l.dir, "bpf") }

// Nodes lists the nodes, node1 first.
func (l *Lab) Nodes() []*Node { return slices.Clone(l.nodes) }

// Node returns node<number>, counted from 1, and panics when there is none.
func (l *Lab) Node(number int) *Node { return l.nodes[number-1] }

// Fabric is the router between the nodes. Its interfaces are named after them.
func (l *Lab) Fabric() *Host { return l.fabric }

// Control is the host that the CA runs on. It is no node: to the mesh it is outside the cluster.
func (l *Lab) Control() *Host { return l.control }

// ControlAddr is Control's address in the lab's primary family.
func (l *Lab) ControlAddr() netip.Addr { return l.control.Addrs[0] }

// stopTimeout is how long a process may take to end at SIGTERM before Close kills it. An
// agent drains for up to ten seconds; the lab's applications are gone by then.
const stopTimeout = 15 * time.Second

// Close ends every process that the lab started (applications first, then agents, then the
// CA), and removes its namespaces and its directory. What agents left pinned goes with the
// lab's bpffs. It may be called again and concurrently; a second call waits for the first.
func (l *Lab) Close() error {
	l.closing.Do(func() { l.closeErr = l.close() })
	return l.closeErr
}

func (l *Lab) close() error {
	l.mu.Lock()
	l.closed = true
	processes := slices.Clone(l.processes)
	captures := slices.Clone(l.captures)
	spaces := slices.Clone(l.spaces)
	l.mu.Unlock()

	var errs []error
	for _, kind := range []processKind{applicationProcess, agentProcess, caProcess} {
		errs = append(errs, l.endAll(processes, kind))
	}
	errs = append(errs, killStrays(inodesOf(spaces)))
	for _, c := range captures {
		errs = append(errs, c.Close())
	}
	for _, s := range slices.Backward(spaces) {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, removeDir(l.dir))...)
}

// endAll ends all processes of one kind at once.
func (l *Lab) endAll(processes []*Process, kind processKind) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, len(processes))
	for i, p := range processes {
		if p.kind != kind {
			continue
		}
		wg.Go(func() { errs[i] = p.end(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// removeDir removes a lab's directory with the bpffs in it, and the directory of all labs
// when this was the last. That of named namespaces stays, as `ip netns` leaves it.
func removeDir(dir string) error {
	bpf := filepath.Join(dir, "bpf")
	for {
		err := unix.Unmount(bpf, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // not mounted
		}
		if err != nil {
			// RemoveAll would unlink pins one by one and still leave the mount.
			return fmt.Errorf("unmount %s: %w", bpf, err)
		}
	}
	for _, state := range agentStateOf(filepath.Base(dir)) {
		if err := os.RemoveAll(state); err != nil {
			return fmt.Errorf("remove what an agent kept: %w", err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the lab's directory: %w", err)
	}
	if err := os.Remove(runDir); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove the labs' directory: %w", err)
	}
	return nil
}

// track hands a resource to Close, or refuses it when Close has begun.
func (l *Lab) track(add func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.New("the lab is closed")
	}
	add()
	return nil
}

func randomSuffix() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))[:5]
}
