package kernel

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"

	"github.com/raceway-mesh/raceway/bpf"
)

// The kubelet's probes of captured pods go to the application: the hook below notes the
// kubelet's connections, steer and the guard leave what is noted alone. It works without an
// agent, as a kubelet that cannot probe a pod would restart it.

// Kubelet is where the node's kubelet stands. Its address would not tell it from the pods
// with hostNetwork.
type Kubelet struct {
	// Cgroup is the id of its cgroup v2, which is the inode of the directory. Processes of
	// cgroups below it are not meant.
	Cgroup uint64
	// PID is its process, in the initial PID namespace; with 0 every process of the cgroup
	// counts as the kubelet.
	PID int
	// WithPods says that processes of pods are in the same cgroup: only PID tells them apart.
	WithPods bool
}

// kubelet is what was told of it.
type kubelet struct {
	mu      sync.Mutex
	wanted  bool  // it should be recognised
	missing error // why it is not
}

// probeSupport is nil, or why connect hooks cannot tell who connects. Whether the hook below
// works is seen when it is loaded.
func probeSupport() error {
	for _, helper := range []asm.BuiltinFunc{asm.FnGetCurrentCgroupId, asm.FnSkStorageGet} {
		if err := features.HaveProgramHelper(ebpf.CGroupSockAddr, helper); err != nil {
			return fmt.Errorf("%v for connect hooks: %w", helper, err)
		}
	}
	return nil
}

// trackHook also serves direct.go.
func trackHook() hook { return hook{progTrack, ebpf.AttachCGroupSockOps} }

// SetKubelet says who the kubelet is. It stays so when the agent ends.
func (d *Datapath) SetKubelet(k Kubelet) error {
	err := d.setKubelet(k)
	if err != nil {
		err = fmt.Errorf("recognise the kubelet: %w", err)
	}
	d.MissKubelet(err)
	return err
}

func (d *Datapath) setKubelet(k Kubelet) error {
	if d.loaded.noProbes != nil {
		return d.loaded.noProbes
	}
	if !d.loaded.tellsProcesses {
		k.PID = 0
	}
	if k.WithPods && k.PID == 0 {
		return errors.New("pods are in its cgroup, and processes cannot be told apart here: give the kubelet a cgroup of its own")
	}
	return d.putKubelet(bpf.RacewayPlace{Netns: d.host.Cookie(), Cgroup: k.Cgroup, Tgid: uint32(k.PID)})
}

// ForgetKubelet makes the probes of whoever was the kubelet count as plaintext.
func (d *Datapath) ForgetKubelet() error {
	d.kubelet.mu.Lock()
	d.kubelet.wanted, d.kubelet.missing = false, nil
	d.kubelet.mu.Unlock()
	if err := d.putKubelet(bpf.RacewayPlace{}); err != nil {
		return fmt.Errorf("forget the kubelet: %w", err)
	}
	return nil
}

func (d *Datapath) putKubelet(p bpf.RacewayPlace) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.freed {
		return os.ErrClosed
	}
	return d.loaded.maps.Kubelet.Put(uint32(0), p)
}

// MissKubelet has Pod.Check say why the kubelet is not recognised. Whoever was it before
// still is.
func (d *Datapath) MissKubelet(cause error) {
	d.kubelet.mu.Lock()
	defer d.kubelet.mu.Unlock()
	d.kubelet.wanted, d.kubelet.missing = true, cause
}

// wantsKubelet also tells whether something that Repair cannot mend is in the way.
func (d *Datapath) wantsKubelet() (wanted bool, missing error) {
	d.kubelet.mu.Lock()
	defer d.kubelet.mu.Unlock()
	return d.kubelet.wanted, d.kubelet.missing
}

func (d *Datapath) checkKubelet() error {
	wanted, missing := d.wantsKubelet()
	if !wanted || missing != nil {
		return missing
	}
	return d.checkProbeHook()
}

func (d *Datapath) checkProbeHook() error {
	return d.checkHooksOf([]hook{trackHook()})
}

// mendProbeHook forgets all connections: the ends of some may have been missed.
func (d *Datapath) mendProbeHook() error {
	if err := d.dropProbes(func(bpf.RacewayTuple, time.Duration) bool { return true }); err != nil {
		return err
	}
	_, err := d.loaded.renewHook(trackHook(), d.cfg)
	return err
}

// repairProbes puts the hook back if somebody detached it.
func (d *Datapath) repairProbes() (mended []string, err error) {
	wanted, _ := d.wantsKubelet()
	if !wanted || d.loaded.noProbes != nil {
		return nil, nil
	}
	mended, err = repair([]part{{"kubelet", d.checkProbeHook, d.mendProbeHook}})
	return mended, errors.Join(err, d.pruneProbes())
}

// probeAge is more than any probe takes.
const probeAge = time.Minute

// pruneProbes forgets old connections that have no socket any more. The hook sees them end,
// unless another program on the node takes its flag off the socket.
func (d *Datapath) pruneProbes() error {
	old := make(map[bpf.RacewayTuple]bool)
	err := d.eachProbe(func(t bpf.RacewayTuple, age time.Duration) {
		if age > probeAge {
			old[t] = true
		}
	})
	if err != nil || len(old) == 0 {
		return err
	}
	connections, err := d.connections(d.host)
	if err != nil {
		return err
	}
	live := make(map[ends]bool, len(connections))
	for _, c := range connections {
		if c.State != tcpTimeWait {
			live[endsOf(c)] = true
		}
	}
	return d.dropProbes(func(t bpf.RacewayTuple, _ time.Duration) bool {
		return old[t] && !live[endsOf(bpf.RacewayConnection{
			Local: t.Remote, LocalPort: t.RemotePort, Remote: t.Local, RemotePort: t.LocalPort,
		})]
	})
}

func (d *Datapath) eachProbe(fn func(t bpf.RacewayTuple, age time.Duration)) error {
	var t bpf.RacewayTuple
	var since uint64
	entries := d.loaded.maps.Probes.Iterate()
	for entries.Next(&t, &since) {
		fn(t, monotonic()-time.Duration(since))
	}
	// It changes all the time: what an iteration misses the next one finds.
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read the kubelet's connections: %w", err)
	}
	return nil
}

func (d *Datapath) dropProbes(which func(t bpf.RacewayTuple, age time.Duration) bool) error {
	var drop []bpf.RacewayTuple
	errs := []error{d.eachProbe(func(t bpf.RacewayTuple, age time.Duration) {
		if which(t, age) {
			drop = append(drop, t)
		}
	})}
	for _, t := range drop {
		errs = append(errs, ignoreMissing(d.loaded.maps.Probes.Delete(t)))
	}
	return errors.Join(errs...)
}

// enter makes a pod known to the programs.
func (l *loaded) enter(r *record) error {
	errs := []error{l.maps.Pods.Put(r.Cookie, podValue(r))}
	for _, a := range r.Addrs {
		errs = append(errs, l.maps.Homes.Put(toAddr(a), r.Cookie))
	}
	return errors.Join(errs...)
}

// leave undoes enter. Another pod may have the address by now.
func (l *loaded) leave(r *record) error {
	errs := []error{ignoreMissing(l.maps.Pods.Delete(r.Cookie))}
	for _, a := range r.Addrs {
		var cookie uint64
		err := l.maps.Homes.Lookup(toAddr(a), &cookie)
		if err == nil && cookie == r.Cookie {
			err = l.maps.Homes.Delete(toAddr(a))
		}
		errs = append(errs, ignoreMissing(err))
	}
	return errors.Join(errs...)
}

// dropStrayHomes forgets addresses of pods that are not known.
func (l *loaded) dropStrayHomes(known map[uint64]bool) error {
	var stray []bpf.RacewayAddr
	var addr bpf.RacewayAddr
	var cookie uint64
	entries := l.maps.Homes.Iterate()
	for entries.Next(&addr, &cookie) {
		if !known[cookie] {
			stray = append(stray, addr)
		}
	}
	errs := []error{entries.Err()}
	for _, addr := range stray {
		errs = append(errs, ignoreMissing(l.maps.Homes.Delete(addr)))
	}
	return errors.Join(errs...)
}
