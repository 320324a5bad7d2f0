package node_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// handler is an agent of functions.
type handler struct {
	add        func(context.Context, discovery.Sandbox) (bool, error)
	check, del func(context.Context, discovery.Sandbox) error
}

func (h handler) Add(ctx context.Context, s discovery.Sandbox) (bool, error) { return h.add(ctx, s) }

func (h handler) Check(ctx context.Context, s discovery.Sandbox) error { return h.check(ctx, s) }

func (h handler) Del(ctx context.Context, s discovery.Sandbox) error { return h.del(ctx, s) }

func answering(captured bool, err error) handler {
	return handler{add: func(context.Context, discovery.Sandbox) (bool, error) { return captured, err }}
}

var web = discovery.Sandbox{
	Pod: dataplane.Name{Namespace: "shop", Name: "web"}, UID: "u1", NetNS: "/run/netns/web",
	Addrs: []netip.Addr{netip.MustParseAddr("10.1.1.2"), netip.MustParseAddr("fd00::2")},
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve runs an agent until the test ends or stop is called.
func serve(t *testing.T, socket string, h node.Handler) (stop func()) {
	t.Helper()
	s, err := node.Listen(node.Config{Socket: socket, Handler: h, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop = func() {
		if cancel(); !stopped {
			stopped = true
			must(t, <-done)
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestHandlerGetsTheSandboxAndItsAnswerReturns(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	var got [3]discovery.Sandbox
	serve(t, socket, handler{
		add:   func(_ context.Context, s discovery.Sandbox) (bool, error) { got[0] = s; return true, nil },
		check: func(_ context.Context, s discovery.Sandbox) error { got[1] = s; return errors.New("no such capture") },
		del:   func(_ context.Context, s discovery.Sandbox) error { got[2] = s; return nil },
	})
	c := node.NewClient(socket)
	if captured, err := c.Add(t.Context(), web); err != nil || !captured {
		t.Errorf("Add = %v, %v", captured, err)
	}
	if err := c.Check(t.Context(), web); err == nil || err.Error() != "no such capture" || errors.Is(err, node.ErrAway) {
		t.Errorf("Check = %v", err)
	}
	must(t, c.Del(t.Context(), web))
	for i, s := range got {
		if !reflect.DeepEqual(s, web) {
			t.Errorf("handler %d got %+v", i, s)
		}
	}
}

func TestPodThatIsNotToBeEnrolledIsNoError(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	serve(t, socket, answering(false, nil))
	if captured, err := node.NewClient(socket).Add(t.Context(), web); captured || err != nil {
		t.Errorf("Add = %v, %v", captured, err)
	}
}

func TestClientTellsWhoIsAway(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, "left.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, l.Close())
	hangsUp := filepath.Join(dir, "hangsup.sock")
	h, err := net.Listen("unix", hangsUp)
	must(t, err)
	t.Cleanup(func() { must(t, h.Close()) })
	go func() {
		for {
			conn, err := h.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	unready := filepath.Join(dir, "unready.sock")
	serve(t, unready, answering(false, fmt.Errorf("%w: no API server", node.ErrNotReady)))
	for socket, test := range map[string]struct {
		is   error
		says string
	}{
		filepath.Join(dir, "none.sock"): {node.ErrAway, "there is no socket"},
		left:                            {node.ErrAway, "nobody listens"},
		hangsUp:                         {node.ErrAway, "went while it was asked"},
		unready:                         {node.ErrNotReady, "no API server"},
	} {
		_, err := node.NewClient(socket).Add(t.Context(), web)
		if !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: Add = %v, want %v with %q", socket, err, test.is, test.says)
		}
	}
}

func TestAgentThatDoesNotAnswerIsNotAway(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	serve(t, socket, handler{add: func(ctx context.Context, _ discovery.Sandbox) (bool, error) {
		<-ctx.Done()
		return false, ctx.Err()
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := node.NewClient(socket).Add(ctx, web); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, node.ErrAway) {
		t.Errorf("Add = %v", err)
	}
}

func TestSuccessorTakesTheSocketWithoutAGap(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	entered, leave := make(chan struct{}), make(chan struct{})
	stopOld := serve(t, socket, handler{add: func(context.Context, discovery.Sandbox) (bool, error) {
		close(entered)
		<-leave
		return false, errors.New("the old one")
	}})
	underWay := make(chan error, 1)
	go func() {
		_, err := node.NewClient(socket).Add(context.Background(), web)
		underWay <- err
	}()
	<-entered
	serve(t, socket, answering(true, nil))
	if captured, err := node.NewClient(socket).Add(t.Context(), web); !captured || err != nil {
		t.Errorf("Add at the successor = %v, %v", captured, err)
	}
	close(leave)
	stopOld() // waits for what is under way, and leaves the socket of the other
	if err := <-underWay; err == nil || err.Error() != "the old one" {
		t.Errorf("Add under way at the old agent = %v", err)
	}
	if captured, err := node.NewClient(socket).Add(t.Context(), web); !captured || err != nil {
		t.Errorf("Add after the old one's end = %v, %v", captured, err)
	}
}

func TestSocketIsForRootAloneAndGoesWithItsAgent(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "raceway")
	socket := filepath.Join(dir, "cni.sock")
	stop := serve(t, socket, answering(true, nil))
	info, err := os.Lstat(socket)
	must(t, err)
	if info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the socket's mode is %v", info.Mode())
	}
	stop()
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestSocketPathThatCannotBe(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	for path, says := range map[string]string{
		file: "not a socket",
		filepath.Join(dir, strings.Repeat("x", 120)): "choose a shorter one",
	} {
		if _, err := node.Listen(node.Config{Socket: path, Log: slog.New(slog.DiscardHandler)}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("Listen(%s) = %v, want %q", path, err, says)
		}
	}
}

// say sends text to the socket as user uid and returns the whole answer: credentials are those
// of the thread that connects, which ends with its goroutine.
func say(t *testing.T, socket string, uid uintptr, text string) string {
	t.Helper()
	var conn net.Conn
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		if uid != 0 {
			runtime.LockOSThread()
			if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); errno != 0 {
				err = errno
				return
			}
		}
		conn, err = net.Dial("unix", socket)
	}()
	<-done
	must(t, err)
	_, err = io.WriteString(conn, text)
	must(t, err)
	got, err := io.ReadAll(conn)
	must(t, errors.Join(err, conn.Close()))
	return string(got)
}

func post(path, body string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: agent\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
}

func TestBadRequestIsAnsweredWithAReason(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	serve(t, socket, answering(true, nil))
	for name, test := range map[string]struct{ request, status, says string }{
		"no JSON":        {post("/v1/add", "x"), "400", "read the request"},
		"no pod":         {post("/v1/add", `{"pod":{"namespace":"shop"}}`), "400", "names no pod"},
		"bad address":    {post("/v1/add", `{"addrs":["x"]}`), "400", "read the request"},
		"too large":      {post("/v1/add", strings.Repeat(" ", 70<<10)), "400", "too large"},
		"unknown path":   {post("/v2/add", "{}"), "404", "there is no POST /v2/add"},
		"unknown method": {"PUT /v1/add HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "404", "there is no PUT /v1/add"},
	} {
		t.Run(name, func(t *testing.T) {
			got := say(t, socket, 0, test.request)
			if !strings.HasPrefix(got, "HTTP/1.1 "+test.status) || !strings.Contains(got, test.says) {
				t.Errorf("got %q, want %s with %q", got, test.status, test.says)
			}
		})
	}
}

func TestOtherUserIsRefusedWhateverTheFileModeSays(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("RACEWAY_REQUIRE_ROOT") == "1" {
			t.Fatal("root is needed to connect as another user")
		}
		t.Skip("root is needed to connect as another user")
	}
	// Not TempDir: the other user could not reach what lies in a directory for us alone.
	dir, err := os.MkdirTemp("", "raceway-node") //nolint:usetesting // see above
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	socket := filepath.Join(dir, "cni.sock")
	serve(t, socket, answering(true, nil))
	must(t, errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o666)))
	if got := say(t, socket, 65534, post("/v1/add", `{"pod":{"namespace":"shop","name":"web"}}`)); !strings.HasPrefix(got, "HTTP/1.1 403") || !strings.Contains(got, "runs as root") {
		t.Errorf("user 65534 got %q, want 403", got)
	}
}
