// Package sandbox finds the network namespace of a pod that runs on this node, for pods that
// nobody told the agent of: those that were there before it.
//
//	<proc>/PID/cgroup ── names the pod ──► <proc>/PID/ns/net ── same inode ──► <run>/<name>
//
// What it finds is evidence that the pod itself can try to forge: a process in it may make
// network namespaces of its own and move there. So of several, one that the container runtime
// gave a name counts before all others, then the one of the pod's oldest process, which is
// the runtime's. The host's namespace never counts, a nameless one only if it was made by
// somebody with the host's privileges, and none that lacks an address of the pod.
package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// Config says where to look. The zero value looks at the host that it runs on.
type Config struct {
	Proc string // the host's /proc; default /proc
	Run  string // where the runtime names network namespaces; default /run/netns
	// HostNetNS is the host's network namespace; default Proc/1/ns/net.
	HostNetNS string
	// Fresh is for how long a look at all processes is believed; default 500 ms. It bounds
	// the work: there is at most one in that time, however many pods are looked for.
	Fresh time.Duration
	Log   *slog.Logger // default: none
}

func (c Config) withDefaults() Config {
	c.Proc = cmp.Or(c.Proc, "/proc")
	c.Run = cmp.Or(c.Run, "/run/netns")
	c.HostNetNS = cmp.Or(c.HostNetNS, c.Proc+"/1/ns/net")
	c.Fresh = cmp.Or(c.Fresh, 500*time.Millisecond)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Finder finds network namespaces. Its methods are safe for concurrent use.
type Finder struct {
	cfg Config

	mu   sync.Mutex // held during a scan: whoever asks meanwhile has its result
	last *scan
}

// New returns a Finder that has looked at nothing yet.
func New(cfg Config) *Finder { return &Finder{cfg: cfg.withDefaults()} }

// Pod is what is known of a pod.
type Pod struct {
	// UID as its cgroups carry it: of a static pod the hash that its kubelet gave it
	// (annotation kubernetes.io/config.hash), and not the UID of its mirror.
	UID   string
	Addrs []netip.Addr // each has to be in the namespace; empty when not known
}

// maxNamespaces bounds how many namespaces of one pod are looked into: a pod may make many.
const maxNamespaces = 16

// ErrNotFound says that the pod has no network namespace here that is surely its own.
var ErrNotFound = errors.New("network namespace not found")

// Find returns a path of the pod's network namespace: one that stays while the pod does,
// where there is one.
func (f *Finder) Find(ctx context.Context, pod Pod) (string, error) {
	s, err := f.scan(ctx)
	if err != nil {
		return "", err
	}
	candidates := s.pods[normal(pod.UID)]
	if len(candidates) == 0 {
		return "", fmt.Errorf("%w: no process on this node is of pod %s%s", ErrNotFound, pod.UID, s.blind())
	}
	var refused []string
	for _, c := range candidates[:min(len(candidates), maxNamespaces)] {
		if err := f.verify(c, pod); err != nil {
			refused = append(refused, fmt.Sprintf("%s %v", c.path(), err))
			continue
		}
		return c.path(), nil
	}
	return "", fmt.Errorf("%w: %s", ErrNotFound, strings.Join(refused, "; "))
}

// scan returns the last look if it is fresh, or looks anew.
func (f *Finder) scan(ctx context.Context) (*scan, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last != nil && time.Since(f.last.at) < f.cfg.Fresh {
		return f.last, nil
	}
	began := time.Now()
	s, err := look(ctx, f.cfg)
	if err != nil {
		return nil, fmt.Errorf("look for network namespaces: %w", err)
	}
	s.at = time.Now()
	f.last = s
	f.cfg.Log.Debug("looked for the network namespaces of pods", "pods", len(s.pods), "took", s.at.Sub(began))
	return s, nil
}

// verify says why a namespace cannot be the pod's.
func (f *Finder) verify(c candidate, pod Pod) (err error) {
	ns, err := netns.Open(c.path())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	if c.name == "" {
		if err := f.verifyNameless(c, ns, pod); err != nil {
			return err
		}
	}
	host, err := netns.Open(f.cfg.HostNetNS)
	if err != nil {
		return fmt.Errorf("cannot be told from the host's: %w", err)
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	if ns.Cookie() == host.Cookie() {
		return errors.New("is the host's network namespace")
	}
	return ns.Do(func() error { return hasAddrs(pod.Addrs) })
}

// verifyNameless is for a namespace that is known from a process alone: that may have ended
// since, and its number be another's; or have made the namespace itself. A pod with a user
// namespace of its own owns its network as well, but runtimes that know such pods give
// their namespaces names.
func (f *Finder) verifyNameless(c candidate, ns *netns.Namespace, pod Pod) error {
	if uid, err := podOf(c.proc); err != nil || uid != normal(pod.UID) {
		return errors.New("is not of the pod any more")
	}
	foreign, err := f.foreign(ns)
	if err == nil && foreign {
		return errors.New("belongs to a user namespace, so the pod may have made it")
	}
	return err
}

// foreign reports whether somebody without the host's privileges made the namespace. Where
// it cannot be told which user namespace is the host's, it is false.
func (f *Finder) foreign(ns *netns.Namespace) (foreign bool, err error) {
	err = ns.WithFD(func(fd int) error {
		owner, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
		if errors.Is(err, unix.EPERM) { // one that is not ours, nor below it
			return nil
		}
		if err != nil {
			return fmt.Errorf("ask for its owner: %w", err)
		}
		defer unix.Close(owner)
		var theirs, hosts unix.Stat_t
		if err := unix.Fstat(owner, &theirs); err != nil {
			return err
		}
		if unix.Stat(f.cfg.Proc+"/1/ns/user", &hosts) == nil {
			foreign = theirs.Dev != hosts.Dev || theirs.Ino != hosts.Ino
		}
		return nil
	})
	return foreign, err
}

// hasAddrs names the first of addrs that no interface of the current namespace has.
func hasAddrs(addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return nil
	}
	present, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list its addresses: %w", err)
	}
	for _, want := range addrs {
		if !slices.ContainsFunc(present, func(a netlink.Addr) bool {
			ip, ok := netip.AddrFromSlice(a.IP)
			return ok && ip.Unmap() == want.Unmap()
		}) {
			return fmt.Errorf("does not have the pod's address %v", want)
		}
	}
	return nil
}

// Stable is the same path of a network namespace under the name that has no link in it: a
// container's /var/run need not be the host's.
func Stable(path string) string {
	if rest, ok := strings.CutPrefix(path, "/var/run/"); ok {
		return "/run/" + rest
	}
	return path
}
