package kernel

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane"
)

// The pins of an agent:
//
//	<Dir>/layout-<hash>/{pods,homes,established,counters,allowed,...}               maps
//	<Dir>/shared/{listeners,receivers,own,...}-<shape>                              maps, see shared.go
//	<Dir>/layout-<hash>/{connect4,connect6,getpeername4,getpeername6,track}         links
//	<Dir>/pods/<cookie>/{steer,ingress,ingress_lo,guard,guard_<n>}                  links
//	<Dir>/pods/<cookie>/{divert,receive}_<n>                                        links
//	<Dir>/new/                                                                      a load that is under way
const (
	layoutPrefix = "layout-"
	newDir       = "new"
	podsDir      = "pods"

	mapCounters    = "counters"
	mapEstablished = "established"
	mapRodata      = ".rodata"

	progSteer     = "steer"
	progIngress   = "ingress"
	progGuard     = "guard"
	progGuardMore = "guard_more"
	progDump      = "dump"
	progTrack     = "track"
)

const maxAddrs = len(bpf.RacewayPod{}.Addrs)

// loaded is what every pod of the agent shares.
type loaded struct {
	spec  *ebpf.CollectionSpec
	maps  bpf.RacewayMaps
	coll  *ebpf.Collection // owns the maps
	dump  *link.Iter
	dir   string // of all pins
	hooks string // directory with the links of the connect hooks
	fresh bool   // made by this agent, not adopted

	udpItersMu sync.Mutex
	udpIters   map[string]*link.Iter // over a namespace's UDP sockets, by program

	track          *ebpf.Program // nil where noProbes and noDirect say why
	noProbes       error         // why the kubelet's probes cannot be told from others
	noDirect       error         // why pods of this node cannot talk by the kernel alone
	listDirect     *link.Iter    // nil where noDirect says why
	tellsProcesses bool          // and not only their cgroups
	peername       map[string]*ebpf.Program
}

type hook struct {
	name   string
	attach ebpf.AttachType
}

func connectHooks() []hook {
	return []hook{{"connect4", ebpf.AttachCGroupInet4Connect}, {"connect6", ebpf.AttachCGroupInet6Connect}}
}

// load adopts the maps of our layout in dir, or makes them; either way the programs are
// this agent's own. records are the pods that must stay captured throughout.
func load(dir string, cfg Config, records map[string]*record) (_ *loaded, err error) {
	// Only kernels before 5.11 account BPF memory to this limit.
	if err := rlimit.RemoveMemlock(); err != nil {
		cfg.Log.Debug("cannot lift RLIMIT_MEMLOCK", "cause", err)
	}
	l, err := newLoaded()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.undo(records), l.close())
		}
	}()
	// A load that died half-way attached nothing that the pins below do not hold.
	if err := os.RemoveAll(filepath.Join(dir, newDir)); err != nil {
		return nil, fmt.Errorf("clear an unfinished load: %w", err)
	}
	l.dir, l.hooks = dir, filepath.Join(dir, layoutPrefix+cfg.layout())
	if _, err := os.Stat(l.hooks); err == nil {
		cfg.Log.Info("adopting the data plane of an earlier agent", "pins", l.hooks)
		if err := l.adopt(cfg); err != nil {
			return nil, fmt.Errorf("adopt %s: %w", l.hooks, err)
		}
	} else if err := l.install(filepath.Join(dir, newDir), cfg, records); err != nil {
		return nil, err
	}
	if err := errors.Join(l.removeOtherLayouts(), l.removeOtherShapes(dir)); err != nil {
		return nil, fmt.Errorf("remove the data plane of another layout: %w", err)
	}
	return l, nil
}

func newLoaded() (*loaded, error) {
	spec, err := bpf.LoadRaceway()
	if err != nil {
		return nil, fmt.Errorf("read the BPF object: %w", err)
	}
	setRetval := features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	if setRetval != nil && !errors.Is(setRetval, ebpf.ErrNotSupported) {
		return nil, fmt.Errorf("probe bpf_set_retval: %w", setRetval)
	}
	l := &loaded{spec: spec, noProbes: probeSupport(), noDirect: directSupport(), udpIters: make(map[string]*link.Iter)}
	l.tellsProcesses = features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnGetCurrentPidTgid) == nil
	for name, value := range map[string]any{
		"redirect_mark":      uint32(markRedirect),
		"tunnel_port":        uint16(dataplane.PortTunnel),
		"can_set_retval":     setRetval == nil,
		"can_probe":          l.noProbes == nil,
		"can_direct":         l.noDirect == nil,
		"can_tell_processes": l.tellsProcesses,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	return l, nil
}

// build makes or opens the maps in path, beside those that are given, and loads the programs
// that all pods share. Without a path nothing is pinned.
func (l *loaded) build(path string, shared map[string]*ebpf.Map) error {
	spec := l.spec.Copy()
	for _, later := range []string{progSteer, progIngress, progGuard, progGuardMore, progTrack, progListDirect, progPeername4, progPeername6, progDivert, progReceive, progNoteOlder, progListOlder} {
		delete(spec.Programs, later)
	}
	for name, m := range spec.Maps {
		if path != "" && name != mapRodata && shared[name] == nil {
			m.Pinning = ebpf.PinByName
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: path}, MapReplacements: shared})
	if err != nil {
		return fmt.Errorf("load BPF programs (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON): %w", err)
	}
	l.coll = coll
	l.maps = bpf.RacewayMaps{
		Admitted:     coll.Maps["admitted"],
		Allowed:      coll.Maps["allowed"],
		ClearFlows:   coll.Maps["clear_flows"],
		Clients:      coll.Maps["clients"],
		Counters:     coll.Maps["counters"],
		Established:  coll.Maps["established"],
		Events:       coll.Maps["events"],
		Flows:        coll.Maps["flows"],
		Fragments:    coll.Maps["fragments"],
		Generation:   coll.Maps["generation"],
		Homes:        coll.Maps["homes"],
		Kubelet:      coll.Maps["kubelet"],
		Listeners:    coll.Maps["listeners"],
		OlderSockets: coll.Maps["older_sockets"],
		Own:          coll.Maps["own"],
		Peers:        coll.Maps["peers"],
		Pods:         coll.Maps["pods"],
		Probes:       coll.Maps["probes"],
		Probing:      coll.Maps["probing"],
		QuicMarks:    coll.Maps["quic_marks"],
		Receivers:    coll.Maps["receivers"],
	}
	l.dump, err = link.AttachIter(link.IterOptions{Program: coll.Programs[progDump]})
	if err != nil {
		return fmt.Errorf("attach iter/tcp: %w", err)
	}
	return l.buildOptional()
}

// buildOptional loads what capture does not rest on.
func (l *loaded) buildOptional() (err error) {
	// What an earlier agent allowed by policies that it knew does not count.
	if err := l.maps.Generation.Put(uint32(0), uint64(0)); err != nil {
		return fmt.Errorf("revoke what was allowed by the kernel: %w", err)
	}
	if l.track, err = l.program(l.spec.Programs[progTrack].Copy()); err != nil {
		l.noProbes, l.noDirect = cmp.Or(l.noProbes, err), cmp.Or(l.noDirect, err)
	}
	if l.noDirect == nil {
		l.noDirect = l.buildDirect()
	}
	return nil
}

func (l *loaded) buildPinned(path string) error {
	shared, err := l.shared(l.dir)
	if err != nil {
		return err
	}
	defer closeMaps(shared) // the collection has its own descriptors
	return l.build(path, shared)
}

// install is one transaction: maps and hooks come into being below fresh, which is renamed
// once they are complete. Before that a failure undoes itself, and a crash leaves nothing
// that the next load does not clear.
func (l *loaded) install(fresh string, cfg Config, records map[string]*record) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(fresh))
		}
	}()
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	if err := l.buildPinned(fresh); err != nil {
		return err
	}
	// Pods captured under another layout must not speak in clear between its end and
	// their OpenPod.
	for _, r := range records {
		if err := l.enter(r); err != nil {
			return fmt.Errorf("carry pod %s over: %w", r.UID, err)
		}
	}
	if err := l.carryOlder(filepath.Dir(fresh), records, cfg.Log); err != nil {
		return err
	}
	for _, h := range connectHooks() {
		if err := l.attachHook(h, filepath.Join(fresh, h.name), cfg); err != nil {
			return err
		}
	}
	l.attachOptional(fresh, cfg)
	if err := os.Rename(fresh, l.hooks); err != nil {
		return fmt.Errorf("put the pins in place: %w", err)
	}
	l.fresh = true
	return nil
}

// undo takes away what install put in place, for a start that failed later. Pods that are in
// force rely on it; without any it would only stay behind, and a cgroup takes 64 programs.
func (l *loaded) undo(records map[string]*record) error {
	if !l.fresh || len(records) > 0 {
		return nil
	}
	return errors.Join(removeLayout(l.hooks), os.RemoveAll(filepath.Join(l.dir, sharedDir)))
}

// hookProgram is what runs at a hook.
func (l *loaded) hookProgram(h hook) *ebpf.Program {
	switch h.name {
	case progTrack:
		return l.track
	case progPeername4, progPeername6:
		return l.peername[h.name]
	}
	return l.coll.Programs[h.name]
}

func (l *loaded) attachHook(h hook, pin string, cfg Config) error {
	root, release, err := CgroupRoot(cfg.CgroupRoot)
	if err != nil {
		return fmt.Errorf("find the cgroup v2 root: %w", err)
	}
	lnk, err := link.AttachCgroup(link.CgroupOptions{Path: root, Attach: h.attach, Program: l.hookProgram(h)})
	if errors.Is(err, unix.E2BIG) { // BPF_CGROUP_MAX_PROGS
		err = errors.New("the kernel takes no more than 64 programs there: find whose they are with bpftool cgroup show " + root)
	}
	if err := errors.Join(err, release()); err != nil {
		return fmt.Errorf("attach %s to cgroup %s: %w", h.name, root, err)
	}
	defer lnk.Close()
	if err := lnk.Pin(pin); err != nil {
		return fmt.Errorf("pin %s: %w", h.name, err)
	}
	return nil
}

// adopt takes the pinned maps over and puts this agent's programs behind the pinned links.
// If one link cannot be updated, those before it get their old program back.
func (l *loaded) adopt(cfg Config) (err error) {
	if err := l.buildPinned(l.hooks); err != nil {
		return err
	}
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for _, u := range slices.Backward(undo) {
			err = errors.Join(err, u())
		}
	}()
	for _, h := range connectHooks() {
		u, err := l.renewHook(h, cfg)
		if err != nil {
			return fmt.Errorf("update %s: %w", h.name, err)
		}
		undo = append(undo, u)
	}
	l.attachOptional(l.hooks, cfg)
	return nil
}

// renewHook puts this agent's program behind the pinned link of a hook, or attaches it anew.
func (l *loaded) renewHook(h hook, cfg Config) (undo func() error, err error) {
	return l.renewHookAt(h, filepath.Join(l.hooks, h.name), cfg)
}

func (l *loaded) renewHookAt(h hook, pin string, cfg Config) (undo func() error, err error) {
	undo, err = replaceProgram(pin, l.hookProgram(h))
	if errors.Is(err, fs.ErrNotExist) {
		return func() error { return os.Remove(pin) }, l.attachHook(h, pin, cfg)
	}
	return undo, err
}

// replaceProgram updates the link pinned at pin, and returns what brings the old program
// back. A link that somebody detached cannot be attached again; its pin goes, and the error
// is fs.ErrNotExist.
func replaceProgram(pin string, prog *ebpf.Program) (undo func() error, err error) {
	lnk, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	defer lnk.Close()
	info, err := lnk.Info()
	if err != nil {
		return nil, err
	}
	id := info.Program
	err = lnk.Update(prog)
	if errors.Is(err, unix.ENOLINK) {
		return nil, errors.Join(fs.ErrNotExist, os.Remove(pin))
	}
	if err != nil {
		return nil, err
	}
	return func() error {
		old, err := ebpf.NewProgramFromID(id)
		if err != nil {
			return fmt.Errorf("bring back program %d: %w", id, err)
		}
		defer old.Close()
		_, err = replaceProgram(pin, old)
		return err
	}, nil
}

func (l *loaded) removeOtherLayouts() error {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), layoutPrefix) && e.Name() != filepath.Base(l.hooks) {
			errs = append(errs, removeLayout(filepath.Join(l.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// removeLayout removes the maps of a layout once its hooks are detached.
func removeLayout(dir string) error {
	var errs []error
	hooks := slices.Concat(connectHooks(), directHooks(), []hook{{name: "probe"}}) // the last of versions before track
	for _, h := range hooks {
		errs = append(errs, removePin(filepath.Join(dir, h.name)))
	}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
}

// instance loads a per-pod program for the namespace with that cookie.
func (l *loaded) instance(name string, cookie uint64) (*ebpf.Program, error) {
	spec := l.spec.Programs[name].Copy()
	patched := false
	for i := range spec.Instructions {
		ins := &spec.Instructions[i]
		if ins.IsConstantLoad(asm.DWord) && ins.Constant == bpf.NetNSPlaceholder {
			ins.Constant = int64(cookie)
			patched = true
		}
	}
	if !patched {
		return nil, fmt.Errorf("program %s has no place for the namespace's cookie", name)
	}
	return l.program(spec)
}

// program loads a program that uses the maps of all.
func (l *loaded) program(spec *ebpf.ProgramSpec) (*ebpf.Program, error) {
	for name, m := range l.coll.Maps {
		err := spec.Instructions.AssociateMap(name, m)
		if err != nil && !errors.Is(err, asm.ErrUnreferencedSymbol) {
			return nil, err
		}
	}
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", spec.Name, err)
	}
	return prog, nil
}

func (l *loaded) close() error {
	var err error
	if l.dump != nil {
		err = l.dump.Close()
	}
	for _, iter := range l.udpIters {
		err = errors.Join(err, iter.Close())
	}
	if l.track != nil {
		err = errors.Join(err, l.track.Close())
	}
	if l.listDirect != nil {
		err = errors.Join(err, l.listDirect.Close())
	}
	for _, prog := range l.peername {
		err = errors.Join(err, prog.Close())
	}
	if l.coll != nil {
		l.coll.Close()
	}
	return err
}

func podValue(r *record) bpf.RacewayPod {
	v := bpf.RacewayPod{AddrCount: uint32(len(r.Addrs))}
	if r.Outbound {
		v.Flags |= bpf.RacewayPodFlagPOD_OUTBOUND
	}
	if r.Inbound {
		v.Flags |= bpf.RacewayPodFlagPOD_INBOUND
	}
	if r.judgesUDP() {
		v.Flags |= bpf.RacewayPodFlagPOD_UDP
	}
	if r.UDPStrict {
		v.Flags |= bpf.RacewayPodFlagPOD_STRICT
	}
	if r.UDPRequire {
		v.Flags |= bpf.RacewayPodFlagPOD_REQUIRE
	}
	for i, a := range r.Addrs {
		v.Addrs[i] = toAddr(a)
	}
	v.Clear.Count = uint32(copy(v.Clear.Ports[:], portRanges(r.UDPClear)))
	return v
}

// toAddr writes IPv4 as ::ffff:a.b.c.d, the programs' one form of address.
func toAddr(a netip.Addr) bpf.RacewayAddr {
	var v bpf.RacewayAddr
	b := a.As16()
	for i := range v.Word {
		v.Word[i] = binary.NativeEndian.Uint32(b[i*4:])
	}
	return v
}

func fromAddr(v bpf.RacewayAddr) netip.Addr {
	var b [16]byte
	for i, w := range v.Word {
		binary.NativeEndian.PutUint32(b[i*4:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

// records parses what an iterator writes.
func records[T any](iterator string, data []byte) ([]T, error) {
	var one T
	size := binary.Size(one)
	if len(data)%size != 0 {
		return nil, fmt.Errorf("%s wrote %d bytes, which are no whole records of %d", iterator, len(data), size)
	}
	list := make([]T, len(data)/size)
	err := binary.Read(bytes.NewReader(data), binary.NativeEndian, list)
	return list, err
}
