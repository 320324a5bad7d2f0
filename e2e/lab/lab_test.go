package lab_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var families = []struct {
	name string
	opts lab.Options
	want []int // bits of a pod's addresses
}{
	{"IPv4", lab.Options{}, []int{32}},
	{"IPv6", lab.Options{IPv6: true}, []int{128}},
	{"dual stack", lab.Options{DualStack: true}, []int{32, 128}},
	{"dual stack, IPv6 first", lab.Options{DualStack: true, IPv6: true}, []int{128, 32}},
}

// addPod adds a pod in namespace shop that answers every byte with the same byte on port 7.
func addPod(t *testing.T, l *lab.Lab, name string, node int) *lab.Pod {
	t.Helper()
	p, err := l.AddPod(lab.PodSpec{Namespace: "shop", Name: name, Node: node})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func serveEcho(t *testing.T, h *lab.Host) {
	t.Helper()
	listener, err := h.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed by the cleanup
			}
			_, _ = io.Copy(conn, conn) // the client judges what comes back
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		if err := listener.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
}

// ask sends message from h and returns the answer and the address that the connection had.
func ask(t *testing.T, h *lab.Host, to netip.AddrPort, message []byte) ([]byte, netip.Addr) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := h.Dial(ctx, to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(message); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return answer, conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
}

func nonce() []byte { return []byte(rand.Text()) }

func TestPodsReachEachOtherFromTheirOwnAddresses(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := labtest.New(t, f.opts)
			server, near, far := addPod(t, l, "server", 1), addPod(t, l, "near", 1), addPod(t, l, "far", 2)
			serveEcho(t, server.Host)
			var bits []int
			for i, a := range server.Addrs {
				bits = append(bits, a.BitLen())
				for _, client := range []*lab.Pod{near, far} {
					message := nonce()
					answer, from := ask(t, client.Host, netip.AddrPortFrom(a, 7), message)
					if !bytes.Equal(answer, message) {
						t.Errorf("%s got %q for %q", client, answer, message)
					}
					if from != client.Addrs[i] {
						t.Errorf("%s spoke from %s, want its own %s", client, from, client.Addrs[i])
					}
				}
				answer, _ := ask(t, l.Control(), netip.AddrPortFrom(a, 7), []byte("outside"))
				if string(answer) != "outside" {
					t.Errorf("control got %q", answer)
				}
			}
			if !slices.Equal(bits, f.want) {
				t.Errorf("pod has %v, want families %v", server.Addrs, f.want)
			}
		})
	}
}

func TestNothingChangesInTheCallersNamespace(t *testing.T) {
	netnstest.Require(t)
	look := func() string {
		var seen strings.Builder
		links, err := net.Interfaces()
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			addrs, err := link.Addrs()
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(link.Name, "rw") {
				seen.WriteString(link.Name + " " + link.Flags.String() + "\n")
				for _, a := range addrs {
					seen.WriteString(a.String() + "\n")
				}
			}
		}
		for _, file := range []string{
			"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/tcp_congestion_control", "net/ipv4/conf/all/rp_filter",
		} {
			value, err := os.ReadFile(filepath.Join("/proc/sys", file))
			if err != nil {
				t.Fatal(err)
			}
			seen.WriteString(file + " " + string(value))
		}
		return seen.String()
	}
	before := look()
	l := labtest.New(t, lab.Options{DualStack: true})
	addPod(t, l, "web", 1)
	if during := look(); during != before {
		t.Errorf("with a lab:\n%s\nwithout:\n%s", during, before)
	}
}

func TestCommandsRunInsideTheNamespace(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	p := addPod(t, l, "web", 1)
	output, err := p.Exec(t.Context(), "readlink", "/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var want string
	if err := p.Do(func() (err error) { want, err = os.Readlink("/proc/thread-self/ns/net"); return err }); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(output)); got != want {
		t.Errorf("child ran in %s, want %s", got, want)
	}
	if own, err := os.Readlink("/proc/self/ns/net"); err != nil || own == want {
		t.Errorf("we are in %s, %v: want our own namespace", own, err)
	}
	if output, err := p.Exec(t.Context(), "sh", "-c", "echo broken >&2; exit 3"); err == nil || !strings.Contains(string(output), "broken") {
		t.Errorf("a failing command gave %q, %v", output, err)
	}
	congestion, err := p.Exec(t.Context(), "cat", "/proc/sys/net/ipv4/tcp_congestion_control")
	if got := string(congestion); err != nil || got != "cubic\n" && got != "reno\n" {
		t.Errorf("congestion control is %q, %v", congestion, err)
	}
}

func TestProcessesStopKillAndLog(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	p := addPod(t, l, "web", 1)
	start := func(script string) *lab.Process {
		process, err := p.Start(exec.Command("sh", "-c", script))
		if err != nil {
			t.Fatal(err)
		}
		return process
	}
	polite := start("trap 'echo bye; exit 0' TERM; echo hello; while :; do sleep 0.02; done")
	waitFor(t, func() bool { return strings.Contains(readLog(t, polite), "hello") })
	if u, err := polite.Usage(); err != nil || u.RSS == 0 || u.FDs == 0 || u.Threads != 1 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if err := polite.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if err := polite.Wait(t.Context()); err != nil || !strings.Contains(readLog(t, polite), "bye") {
		t.Errorf("after SIGTERM: %v, log %q", err, readLog(t, polite))
	}
	stubborn := start("trap '' TERM; echo deaf; while :; do sleep 0.02; done")
	waitFor(t, func() bool { return strings.Contains(readLog(t, stubborn), "deaf") })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := stubborn.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stopping one that ignores SIGTERM: %v", err)
	}
	if err := stubborn.Kill(); err != nil {
		t.Error(err)
	}
	var exit *exec.ExitError
	if err := stubborn.Wait(t.Context()); !errors.As(err, &exit) || stubborn.Running() {
		t.Errorf("after SIGKILL: %v, running %v", err, stubborn.Running())
	}
	if err := stubborn.Kill(); err != nil {
		t.Errorf("killing it again: %v", err)
	}
}

func readLog(t *testing.T, p *lab.Process) string {
	t.Helper()
	content, err := os.ReadFile(p.Log)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatal("not within 10 s")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestCloseEndsDaemonsAndLeavesNothing(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	p := addPod(t, l, "web", 1)
	// The grandchild leaves the group and outlives its parent.
	output, err := p.Exec(t.Context(), "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo started")
	if err != nil || !strings.Contains(string(output), "started") {
		t.Fatalf("%q, %v", output, err)
	}
	pin(t, l)
	found := strings.Join(l.Leftovers(), "\n")
	for _, want := range []string{"(sleep)", "network namespace " + l.Name() + "-node1", "mount " + l.Dir() + "/bpf", "directory " + l.Dir(), "pinned object"} {
		if !strings.Contains(found, want) {
			t.Errorf("an open lab does not show %q:\n%s", want, found)
		}
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if left := l.Leftovers(); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := p.Start(exec.Command("true")); err == nil {
		t.Error("a closed lab started a process")
	}
}

// pin pins a map as an agent that was killed leaves it.
func pin(t *testing.T, l *lab.Lab) {
	t.Helper()
	output, err := exec.Command("bpftool", "map", "create", filepath.Join(l.Dir(), "bpf", "left"),
		"type", "array", "key", "4", "value", "4", "entries", "1", "name", "left").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) && os.Getenv("RACEWAY_REQUIRE_ROOT") != "1" {
		t.Skip("needs bpftool")
	}
	if err != nil {
		t.Fatalf("bpftool: %v: %s", err, output)
	}
	if pins := l.Pins(); len(pins) != 1 {
		t.Errorf("pins are %v, want the one", pins)
	}
}

func TestAnotherProcessRemovesALabWhoseMakerIsGone(t *testing.T) {
	if name := os.Getenv("LAB_TEST_ABANDON"); name != "" {
		abandon(t, name)
	}
	netnstest.Require(t)
	name := "rw" + strings.ToLower(rand.Text()[:5])
	child := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	child.Env = append(os.Environ(), "LAB_TEST_ABANDON="+name)
	output, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the child did not kill itself: %v\n%s", err, output)
	}
	if known, err := lab.Known(); err != nil || !maps.Equal(onlyOf(known, name), map[string]bool{name: false}) {
		t.Errorf("labs known are %v, %v", known, err)
	}
	found, err := lab.Remove(name)
	if err != nil || !strings.Contains(strings.Join(found, "\n"), "(sleep)") {
		t.Errorf("removed %v, %v: want the kept process among it", found, err)
	}
	if found, err := lab.Remove(name); err == nil {
		t.Errorf("there is still %v", found)
	}
}

func onlyOf(known map[string]bool, name string) map[string]bool {
	maps.DeleteFunc(known, func(k string, _ bool) bool { return k != name })
	return known
}

// abandon makes a lab that is to be kept, and dies.
func abandon(t *testing.T, name string) {
	l, err := lab.New(t.Context(), lab.Options{Name: name, Keep: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Node(1).Start(exec.Command("sleep", "1000")); err != nil {
		t.Fatal(err)
	}
	if _, err := lab.Remove(name); err == nil {
		t.Fatal("removed the lab of a process that runs")
	}
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Fatal(self.Kill(), <-make(chan struct{}))
}

func TestChildrenDieWithTheLabsProcess(t *testing.T) {
	if os.Getenv("LAB_TEST_DIE") != "" {
		dieWithChild(t)
	}
	netnstest.Require(t)
	pidFile := filepath.Join(t.TempDir(), "pid")
	name := "rw" + strings.ToLower(rand.Text()[:5])
	child := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	child.Env = append(os.Environ(), "LAB_TEST_DIE="+name, "LAB_TEST_PID="+pidFile)
	output, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the child did not kill itself: %v\n%s", err, output)
	}
	content, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(content))
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		running, err := lab.Running(pid)
		return err == nil && !running
	})
	if _, err := lab.Remove(name); err != nil {
		t.Error(err)
	}
}

func dieWithChild(t *testing.T) {
	l, err := lab.New(t.Context(), lab.Options{Name: os.Getenv("LAB_TEST_DIE")})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if _, err := l.Node(1).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(os.Getenv("LAB_TEST_PID"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Fatal(self.Kill(), <-make(chan struct{}))
}
