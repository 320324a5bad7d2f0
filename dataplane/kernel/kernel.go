// Package kernel puts a pod's traffic into the agent's hands and keeps it there: it loads
// the BPF programs of package bpf, attaches them, and owns every kernel object that
// enrolment leaves behind (pins, routing rules, sysctls, listeners).
//
//	app connect() ── connect4/6: SO_MARK ── ip rule ── lo ── steer ──► Outbound listener
//	client SYN ──────────────── eth0 ────────────────────── steer ──► Inbound listener
//	peer SYN :15008 ─────────── eth0 ────────────────────── steer ──► Tunnel listener
//	DialApp: from the client's address, by lo ──────────────────────► app
//	DialTunnel, DialDirect ── eth0 ── guard (host end of the veth) ──► network
//
// What is in force stays in force when the agent dies: programs and maps are pinned, the
// listeners vanish with the process, and so connections are refused rather than plain.
// The next agent adopts it all.
package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/raceway-mesh/raceway/bpf"
)

// InboundMode is how connections that arrive in a pod reach the agent's listeners.
type InboundMode string

// Modes of inbound redirection. SK_LOOKUP runs once per connection and answers with a
// reset when the agent is away; TC runs per packet and drops, for kernels before 5.17.
const (
	InboundAuto     InboundMode = "auto"
	InboundSKLookup InboundMode = "sk_lookup"
	InboundTC       InboundMode = "tc"
)

// TCMode is how programs are attached to interfaces.
type TCMode string

// Modes of attaching to interfaces; tcx needs Linux 6.6.
const (
	TCAuto   TCMode = "auto"
	TCX      TCMode = "tcx"
	TCClsact TCMode = "clsact"
)

// Config configures a Datapath.
type Config struct {
	// Dir in a BPF file system holds the pins of this agent. Where /sys/fs/bpf is none, a
	// BPF file system is mounted at /run/raceway/bpffs and Dir is taken relative to it.
	Dir string
	// StateDir holds what releasing a pod needs to know; "" is /run/raceway/<base of Dir>.
	StateDir string
	// CgroupRoot is the root of the cgroup v2 hierarchy; "" finds it.
	CgroupRoot string
	// HostNetNS is the network namespace with the host ends of the pods' veth pairs; "" is
	// the agent's own.
	HostNetNS string
	// Inbound is auto when "".
	Inbound InboundMode
	// TC is auto when "".
	TC TCMode
	// DisableGuard leaves pods unguarded; only a test that must see plaintext wants that.
	DisableGuard bool
	// Log must be set.
	Log *slog.Logger

	otherLayout string // stands in for another version's, in tests
}

func (c Config) layout() string { return cmp.Or(c.otherLayout, bpf.Layout()) }

func (c Config) withDefaults() Config {
	if c.StateDir == "" && c.Dir != "" {
		c.StateDir = filepath.Join(runDir, filepath.Base(c.Dir))
	}
	if c.Inbound == "" {
		c.Inbound = InboundAuto
	}
	if c.TC == "" {
		c.TC = TCAuto
	}
	if c.HostNetNS == "" {
		c.HostNetNS = "/proc/self/ns/net"
	}
	return c
}

// Validate joins every complaint.
func (c Config) Validate() error {
	var errs []error
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("bpf directory %q is not an absolute path", c.Dir))
	}
	if !slices.Contains([]InboundMode{"", InboundAuto, InboundSKLookup, InboundTC}, c.Inbound) {
		errs = append(errs, fmt.Errorf("inbound mode %q is none of auto, sk_lookup, tc", c.Inbound))
	}
	if !slices.Contains([]TCMode{"", TCAuto, TCX, TCClsact}, c.TC) {
		errs = append(errs, fmt.Errorf("tc mode %q is none of auto, tcx, clsact", c.TC))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("no logger"))
	}
	return errors.Join(errs...)
}

// PodConfig names a pod to prepare.
type PodConfig struct {
	UID   string
	NetNS string // path of its network namespace
	Addrs []netip.Addr
}

func (c PodConfig) validate() error {
	var errs []error
	if c.UID == "" {
		errs = append(errs, errors.New("no UID"))
	}
	if c.NetNS == "" {
		errs = append(errs, errors.New("no network namespace"))
	}
	if len(c.Addrs) == 0 {
		errs = append(errs, errors.New("no address"))
	}
	if len(c.Addrs) > maxAddrs {
		errs = append(errs, fmt.Errorf("%d addresses, at most %d are possible", len(c.Addrs), maxAddrs))
	}
	return errors.Join(errs...)
}

// AdoptedPod is a pod that an earlier agent left in force and that is not open yet.
type AdoptedPod struct {
	UID   string
	NetNS string
	Addrs []netip.Addr
	UDP   bool // captured as well
}

// Counter is one of the counters that the programs keep, summed over all CPUs.
type Counter struct {
	Hook   string // connect, steer, ingress or guard
	Reason string
	Value  uint64
}

// Finding is one thing that Pod.Check looked at.
type Finding struct {
	Check  string // what was looked at
	OK     bool
	Detail string // what is wrong, and what to do
}

// What the data plane uses inside pods. Marks are scrubbed when a packet leaves the
// pod's namespace, so they can only collide with an application that routes by marks.
const (
	// markRedirect sends a packet to lo, where the outbound listener waits.
	markRedirect = 0x72610
	// markApp is on the agent's connections to the application, and brings the replies,
	// which are addressed to the client, back by lo.
	markApp = 0x72611
	// markMask makes the two one to the routing rule.
	markMask = 0xfffffffe

	routeTable   = 15001
	rulePriority = 150
)
