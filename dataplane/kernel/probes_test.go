package kernel_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

//	node: kubelet ─────────────┐
//	      hostNetwork pod ─────┼── guard ── web (captured; nobody listens for the agent)
//	      both at one address ─┘

// dialler is a process on the node, in a cgroup, that dials what it is told.
type dialler struct {
	pid     int
	in      io.Writer
	answers *bufio.Reader
}

// order is what a dialler is told, and answer what came of it.
type order struct {
	Dial    string        // address
	Port    int           // local port; 0 for any
	Bound   time.Duration // of the dial
	Ask     string        // or what is sent over the connection; its answer is as long
	HangUp  bool          // or the end of the connection
	Abandon bool          // likewise, without a word: by a reset
}

type answer struct {
	Local   string
	Answer  string
	Refused bool
	Timeout bool
	Err     string
}

// runDialler is this test binary as a dialler; see TestMain.
func runDialler() error {
	var conn net.Conn
	orders, answers := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := orders.Decode(&o); err != nil {
			return err
		}
		var a answer
		var err error
		switch {
		case o.Dial != "":
			d := net.Dialer{Timeout: o.Bound, LocalAddr: &net.TCPAddr{Port: o.Port}}
			d.Control = func(_, _ string, c syscall.RawConn) (err error) {
				return errors.Join(c.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				}), err)
			}
			if conn, err = d.Dial("tcp", o.Dial); err == nil {
				a.Local = conn.LocalAddr().String()
			}
		case o.HangUp:
			err = conn.Close()
		case o.Abandon:
			err = errors.Join(conn.(*net.TCPConn).SetLinger(0), conn.Close())
		default:
			got := make([]byte, len(o.Ask))
			if _, err = io.WriteString(conn, o.Ask); err == nil {
				err = conn.SetReadDeadline(time.Now().Add(o.Bound))
			}
			if err == nil {
				_, err = io.ReadFull(conn, got)
			}
			a.Answer = string(got)
		}
		if err != nil {
			a.Err, a.Refused, a.Timeout = err.Error(), errors.Is(err, syscall.ECONNREFUSED), isTimeout(err)
		}
		if err := answers.Encode(a); err != nil {
			return err
		}
	}
}

// newCgroup makes a cgroup below the root of the version 2 hierarchy, or below parent.
func newCgroup(t testing.TB, parent string) (path string, id uint64) {
	t.Helper()
	if parent == "" {
		root, release, err := kernel.CgroupRoot("")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = release() })
		parent = root
	}
	path = filepath.Join(parent, "raceway-test-"+strings.ToLower(rand.Text()[:10]))
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	})
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return path, st.Ino
}

// newDialler starts one in the node's namespace and a cgroup.
func (f *fixture) newDialler(t testing.TB, cgroup string) *dialler {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), "RACEWAY_TEST_DIALLER=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	netnstest.Do(t, f.node.Namespace, cmd.Start)
	t.Cleanup(func() {
		_ = in.Close() // it ends, with an error
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("dialler: %s", &stderr)
		}
	})
	return &dialler{pid: cmd.Process.Pid, in: in, answers: bufio.NewReader(out)}
}

func (d *dialler) do(t testing.TB, o order) answer {
	t.Helper()
	if o.Bound == 0 {
		o.Bound = patience
	}
	if err := json.NewEncoder(d.in).Encode(o); err != nil {
		t.Fatal(err)
	}
	line, err := d.answers.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		t.Fatal(err)
	}
	return a
}

// dial connects; the local port is returned.
func (d *dialler) dial(t testing.TB, to netip.AddrPort) netip.AddrPort {
	t.Helper()
	a := d.do(t, order{Dial: to.String()})
	if a.Err != "" {
		t.Fatalf("dial %v: %s", to, a.Err)
	}
	return netip.MustParseAddrPort(a.Local)
}

// probe connects and has its question answered.
func (d *dialler) probe(t testing.TB, to netip.AddrPort) {
	t.Helper()
	d.dial(t, to)
	d.asks(t)
	d.do(t, order{HangUp: true})
}

func (d *dialler) asks(t testing.TB) {
	t.Helper()
	const question = "are you alive?"
	if a := d.do(t, order{Ask: question}); a.Answer != question {
		t.Errorf("the application answered %q, %s", a.Answer, a.Err)
	}
}

// isShutOut wants the dialler to have no connection: refused, or where TC redirects unanswered.
func (d *dialler) isShutOut(t testing.TB, m mode, o order) {
	t.Helper()
	if m.inbound == kernel.InboundTC {
		o.Bound = 300 * time.Millisecond
	}
	a := d.do(t, o)
	switch {
	case a.Err == "":
		t.Errorf("%s: connected from %s", o.Dial, a.Local)
		d.do(t, order{HangUp: true})
	case m.inbound == kernel.InboundTC && a.Timeout, a.Refused:
	default:
		t.Errorf("%s: %s, want connection refused", o.Dial, a.Err)
	}
}

// echo serves in the pod as an application does.
func (f *fixture) echo(t testing.TB, at netip.AddrPort) {
	t.Helper()
	l := netnstest.Listen(t, f.web.Namespace, "tcp", at.String())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn) // until the client or the test ends
				_ = conn.Close()
			}()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
}

// probed is an enrolled pod whose applications serve on port 8080 of either address, a
// kubelet, and a pod with hostNetwork.
type probed struct {
	*fixture
	cgroup           string
	kubelet, hostNet *dialler
}

func newProbed(t *testing.T, m mode) *probed {
	t.Helper()
	p := &probed{fixture: enrolled(t, m)}
	for _, fam := range families() {
		p.echo(t, p.at(fam))
	}
	cgroup, id := newCgroup(t, "")
	others, _ := newCgroup(t, "")
	p.cgroup = cgroup
	p.kubelet, p.hostNet = p.newDialler(t, cgroup), p.newDialler(t, others)
	if err := p.dp.SetKubelet(kernel.Kubelet{Cgroup: id}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *probed) at(fam family) netip.AddrPort { return netip.AddrPortFrom(fam.of(p.web), 8080) }

// strand ends the agent, as a crash does.
func (p *probed) strand(t *testing.T) {
	t.Helper()
	if err := p.dp.Close(); err != nil {
		t.Fatal(err)
	}
}

// revive starts the next agent, for the fixture to unload.
func (p *probed) revive(t *testing.T) {
	t.Helper()
	p.open(t)
	p.openPod(t)
}

func TestOnlyTheKubeletReachesApplicationsWithoutAnAgent(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		p := newProbed(t, m)
		inner, _ := newCgroup(t, p.cgroup)
		child := p.newDialler(t, inner)
		p.strand(t)
		for _, fam := range families() {
			at := p.at(fam)
			p.kubelet.probe(t, at)
			p.hostNet.isShutOut(t, m, order{Dial: at.String()})
			child.isShutOut(t, m, order{Dial: at.String()})
			// The tunnel is the agent's, whoever asks.
			p.kubelet.isShutOut(t, m, order{Dial: netip.AddrPortFrom(at.Addr(), 15008).String()})
			if a := p.kubelet.do(t, order{Dial: netip.AddrPortFrom(at.Addr(), 9).String()}); !a.Refused {
				t.Errorf("a closed port: %+v, want connection refused", a)
			}
		}
		// What `kubectl port-forward` does: dial loopback inside the pod.
		netnstest.Listen(t, p.web.Namespace, "tcp", "127.0.0.1:7070")
		dial(t, p.web.Namespace, netip.MustParseAddrPort("127.0.0.1:7070"))
		p.revive(t)
		p.kubelet.probe(t, p.at(families()[0]))
		assertCaptured(t, p.fixture)
	})
}

func TestProbesPassTheAgentBy(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		p := newProbed(t, m)
		for _, fam := range families() {
			p.kubelet.probe(t, p.at(fam))
			local := p.hostNet.dial(t, p.at(fam))
			if got := addrPort(accept(t, p.pod.Inbound()).RemoteAddr()); got != local {
				t.Errorf("the agent accepted %v, want only the pod with hostNetwork at %v", got, local)
			}
		}
		if got := p.counter(t, "probe", "opened"); got != 2 {
			t.Errorf("%d probes were noted, want 2", got)
		}
		if steer := p.counter(t, "steer", "probe") + p.counter(t, "ingress", "probe"); steer != 2 {
			t.Errorf("%d probes were steered, want 2", steer)
		}
		eventually(t, "every probe to be forgotten", func() bool { return p.counter(t, "probe", "closed") == 2 && p.probes(t) == 0 })
	})
}

// shared opens a pinned map that all layouts share.
func (f *fixture) shared(t testing.TB, name string) *ebpf.Map {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(pinDir(f), "shared", name+"-*"))
	if err != nil || len(paths) != 1 {
		t.Fatalf("%s: %v, %v", name, paths, err)
	}
	m, err := ebpf.LoadPinnedMap(paths[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// probes counts the connections that are noted.
func (f *fixture) probes(t testing.TB) (n int) {
	t.Helper()
	var key bpf.RacewayTuple
	var since uint64
	entries := f.shared(t, "probes").Iterate()
	for entries.Next(&key, &since) {
		n++
	}
	if err := entries.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestTupleOfAnEndedProbeIsNobodysPass(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		p := newProbed(t, m)
		p.strand(t)
		for _, fam := range families() {
			at := p.at(fam)
			local := p.kubelet.dial(t, at)
			p.kubelet.asks(t)
			p.kubelet.do(t, order{Abandon: true}) // no TIME_WAIT keeps the port
			eventually(t, "the probe to be forgotten", func() bool { return p.probes(t) == 0 })
			p.hostNet.isShutOut(t, m, order{Dial: at.String(), Port: int(local.Port())})
		}
		p.revive(t)
	})
}

func TestProbeToAClosedPortIsForgotten(t *testing.T) {
	netnstest.Require(t)
	p := newProbed(t, modes()[0])
	for _, fam := range families() {
		if a := p.kubelet.do(t, order{Dial: netip.AddrPortFrom(fam.of(p.web), 9).String()}); !a.Refused {
			t.Errorf("a closed port: %+v, want connection refused", a)
		}
	}
	if opened, left := p.counter(t, "probe", "opened"), p.probes(t); opened != 2 || left != 0 {
		t.Errorf("%d connections were noted and %d are left, want 2 and 0", opened, left)
	}
}

func TestGuardPassesTheProbesTupleAlone(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		p := newProbed(t, m)
		w := newWire(t, p.node, p.web, p.db)
		node := p.kubelet.dial(t, p.at(families()[0]))
		for _, c := range []struct {
			name       string
			from, to   uint16
			flags      func(*layers.TCP)
			wantedPass bool
		}{
			{"the probe's own", 8080, node.Port(), ack, true},
			{"a SYN with its tuple", 8080, node.Port(), syn, false},
			{"another port of the pod", 8081, node.Port(), ack, false},
			{"another port of the node", 8080, node.Port() ^ 1, ack, false},
		} {
			before := p.counter(t, "guard", "passed_probe")
			ip := w.ip4(layers.IPProtocolTCP)
			ip.DstIP = node.Addr().AsSlice()
			segment := tcp(c.flags)
			segment.SrcPort, segment.DstPort = layers.TCPPort(c.from), layers.TCPPort(c.to)
			w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(ip), segment, gopacket.Payload(nonce))
			w.arrives(t, nonce) // it has been judged
			if passed := p.counter(t, "guard", "passed_probe") > before; passed != c.wantedPass {
				t.Errorf("%s: passed is %v, want %v", c.name, passed, c.wantedPass)
			}
		}
		if dropped := p.counter(t, "guard", "dropped_payload") + p.counter(t, "guard", "dropped_connect"); dropped != 3 {
			t.Errorf("the guard dropped %d forged segments, want 3", dropped)
		}
	})
}

// A server that speaks first learns that a TCP probe hung up before it did. Were what it says
// dropped, it would say it again for minutes.
func TestServerThatSpeaksFirstSeesTheProbeHangUp(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		p := newProbed(t, m)
		for _, fam := range families() {
			at := netip.AddrPortFrom(fam.of(p.web), 3306)
			server := netnstest.Listen(t, p.web.Namespace, "tcp", at.String())
			p.kubelet.dial(t, at)
			conn := accept(t, server)
			p.kubelet.do(t, order{HangUp: true})
			eventually(t, "the probe to be forgotten", func() bool { return p.probes(t) == 0 })
			if _, err := io.WriteString(conn, "welcome"); err != nil {
				t.Fatal(err)
			}
			eventually(t, fam.name+": the server to see a reset", func() bool {
				_, err := io.WriteString(conn, "still there?")
				return err != nil
			})
		}
		if p.counter(t, "guard", "passed_ended") == 0 || p.counter(t, "guard", "dropped_payload") != 0 {
			t.Error("the guard did not pass what the kernel answers with a reset")
		}
	})
}

func TestKubeletIsToldFromItsCgroupByItsProcess(t *testing.T) {
	netnstest.Require(t)
	m := modes()[0]
	p := newProbed(t, m)
	if inode(t, "/proc/self/ns/pid") != 0xeffffffc { // PROC_PID_INIT_INO
		t.Skip("needs the initial PID namespace")
	}
	_, id := newCgroup(t, "")
	if err := p.dp.SetKubelet(kernel.Kubelet{Cgroup: id, WithPods: true}); err == nil {
		t.Error("a cgroup that has pods in it was taken for the kubelet's")
	}
	id = inode(t, p.cgroup)
	if err := p.dp.SetKubelet(kernel.Kubelet{Cgroup: id, PID: p.kubelet.pid, WithPods: true}); err != nil {
		if netnstest.KernelBefore(6, 1) {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	neighbour := p.newDialler(t, p.cgroup)
	p.strand(t)
	p.kubelet.probe(t, p.at(families()[0]))
	neighbour.isShutOut(t, m, order{Dial: p.at(families()[0]).String()})
	p.revive(t)
	if err := p.dp.ForgetKubelet(); err != nil {
		t.Fatal(err)
	}
	p.strand(t)
	p.kubelet.isShutOut(t, m, order{Dial: p.at(families()[0]).String()})
	p.revive(t)
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// A live probe goes on, and new ones are recognised, while one agent follows another.
func TestKubeletIsKnownToTheNextAgent(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		p := newProbed(t, m)
		base := p.cfg
		p.kubelet.dial(t, p.at(families()[1]))
		second := p.newDialler(t, p.cgroup)
		for _, layout := range []string{"", "another", ""} {
			p.strand(t)
			p.cfg = base.WithLayout(layout)
			p.revive(t)
			p.kubelet.asks(t)
			second.probe(t, p.at(families()[0]))
			assertGuarded(t, p.fixture)
		}
		p.kubelet.do(t, order{HangUp: true})
		eventually(t, "every probe to be forgotten", func() bool { return p.probes(t) == 0 })
	})
}

// fill notes connections that nobody has, as if the node had been up for no time.
func (f *fixture) fill(t *testing.T) {
	t.Helper()
	m := f.shared(t, "probes")
	for i := range m.MaxEntries() + 1 {
		err := m.Put(bpf.RacewayTuple{Netns: 1, LocalPort: uint16(i), RemotePort: uint16(i >> 16)}, uint64(0))
		if errors.Is(err, unix.E2BIG) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the map of probes has no bound")
}

func TestFullMapShutsOutAndIsPruned(t *testing.T) {
	netnstest.Require(t)
	m := modes()[0]
	p := newProbed(t, m)
	at := p.at(families()[0])
	p.kubelet.dial(t, at)
	p.fill(t)
	second := p.newDialler(t, p.cgroup)
	if err := p.pod.Close(); err != nil { // nobody listens for the agent
		t.Fatal(err)
	}
	second.isShutOut(t, m, order{Dial: at.String()})
	if p.counter(t, "probe", "refused_full") != 1 {
		t.Error("nobody counted that the map is full")
	}
	makeOld(t, p.shared(t, "probes"))
	if mended, err := p.dp.Repair(); err != nil || len(mended) > 0 {
		t.Fatalf("mended %v: %v", mended, err)
	}
	if n := p.probes(t); n != 1 {
		t.Errorf("%d connections are noted, want the one that lives", n)
	}
	p.kubelet.asks(t)
	second.probe(t, at)
	p.openPod(t)
}

// makeOld has all connections noted at boot.
func makeOld(t *testing.T, m *ebpf.Map) {
	t.Helper()
	var key bpf.RacewayTuple
	var since uint64
	var young []bpf.RacewayTuple
	entries := m.Iterate()
	for entries.Next(&key, &since) {
		if since != 0 {
			young = append(young, key)
		}
	}
	for _, key := range young {
		if err := m.Put(key, uint64(0)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRepairPutsTheProbeHookBack(t *testing.T) {
	netnstest.Require(t)
	p := newProbed(t, modes()[0])
	hooks, err := filepath.Glob(filepath.Join(pinDir(p.fixture), "layout-*", "track"))
	if err != nil || len(hooks) != 1 {
		t.Fatalf("hooks %v: %v", hooks, err)
	}
	p.kubelet.dial(t, p.at(families()[0]))
	if err := detach(hooks[0]); err != nil {
		t.Fatal(err)
	}
	if got := p.kubeletFinding(t); !strings.Contains(got, "is not among") {
		t.Errorf("check says %q of a hook that is detached", got)
	}
	p.kubelet.do(t, order{HangUp: true}) // and nobody sees it
	if p.probes(t) != 1 {
		t.Fatal("the connection was forgotten without the hook")
	}
	mended, err := p.dp.Repair()
	if err != nil || len(mended) != 1 || !strings.HasPrefix(mended[0], "kubelet: ") {
		t.Errorf("mended %v: %v", mended, err)
	}
	if p.probes(t) != 0 {
		t.Error("a connection whose end nobody saw is still noted")
	}
	p.kubelet.probe(t, p.at(families()[0]))
	if got := p.kubeletFinding(t); got != "" {
		t.Errorf("check says %q", got)
	}
	p.dp.MissKubelet(errors.New("nobody is called kubelet"))
	if got := p.kubeletFinding(t); !strings.Contains(got, "nobody is called kubelet; its probes count as plaintext") {
		t.Errorf("check says %q of a kubelet that is not found", got)
	}
}

// kubeletFinding is what check says of the kubelet; "" when all is well.
func (f *fixture) kubeletFinding(t *testing.T) string {
	t.Helper()
	for _, finding := range f.pod.Check(t.Context()) {
		if finding.Check == "kubelet" {
			return finding.Detail
		}
	}
	t.Fatal("check does not look at the kubelet")
	return ""
}

func TestAddressOfAReleasedPodIsNoPods(t *testing.T) {
	netnstest.Require(t)
	p := newProbed(t, modes()[0])
	if err := p.pod.Remove(); err != nil {
		t.Fatal(err)
	}
	p.kubelet.probe(t, p.at(families()[0]))
	if noted, elsewhere := p.counter(t, "probe", "opened"), p.counter(t, "probe", "elsewhere"); noted != 0 || elsewhere != 1 {
		t.Errorf("%d connections were noted, %d of the kubelet's led elsewhere, want 0 and 1", noted, elsewhere)
	}
}

// BenchmarkConnect measures what probes cost a connect() of a process on the node that is no
// kubelet, to a closed port. The whole varies more than the hook takes, so the kernel's own
// measure of the hook is reported as well: the time in it for one connect().
func BenchmarkConnect(b *testing.B) {
	netnstest.Require(b)
	f := newFixture(b, modes()[0])
	_, id := newCgroup(b, "")
	if err := f.dp.SetKubelet(kernel.Kubelet{Cgroup: id}); err != nil {
		b.Fatal(err)
	}
	hooks, err := filepath.Glob(filepath.Join(pinDir(f), "layout-*", "track"))
	if err != nil || len(hooks) != 1 {
		b.Fatalf("hooks %v: %v", hooks, err)
	}
	b.Run("plain", func(b *testing.B) { f.connects(b) })
	b.Run("measured", func(b *testing.B) {
		counting, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
		if err != nil {
			b.Fatal(err)
		}
		defer counting.Close()
		for _, h := range []string{"connect4", "track"} {
			before := spent(b, filepath.Join(filepath.Dir(hooks[0]), h))
			defer func() {
				b.ReportMetric(float64(spent(b, filepath.Join(filepath.Dir(hooks[0]), h))-before)/float64(b.N), h+"-ns/op")
			}()
		}
		f.connects(b)
	})
	if err := detach(hooks[0]); err != nil {
		b.Fatal(err)
	}
	b.Run("without the hook", func(b *testing.B) { f.connects(b) })
}

func (f *fixture) connects(b *testing.B) {
	netnstest.Do(b, f.node.Namespace, func() error {
		for b.Loop() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}); !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("connect: %w", err)
			}
			if err := unix.Close(fd); err != nil {
				return err
			}
		}
		return nil
	})
}

// spent is the time that the program behind a pinned link has run for.
func spent(b *testing.B, pin string) time.Duration {
	b.Helper()
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		b.Fatal(err)
	}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		b.Fatal(err)
	}
	defer prog.Close()
	stats, err := prog.Stats()
	if err != nil {
		b.Fatal(err)
	}
	return stats.Runtime
}
