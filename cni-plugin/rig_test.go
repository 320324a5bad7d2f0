package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/cni-plugin/install"
	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// headPlugin is the name under which this test's own binary is the first plugin of the list.
const headPlugin = "raceway-testnet"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == headPlugin {
		skel.PluginMainFuncs(skel.CNIFuncs{
			Add: headAdd, Check: headNothing, Del: headDel, GC: headNothing, Status: headNothing,
		}, version.All, headPlugin)
		return
	}
	// A program with the race detector waits for a second when it ends.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	code := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// built is the plugin as it is shipped, made once.
var built struct {
	once sync.Once
	dir  string
	err  error
}

func binary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "raceway-cni"); built.err != nil { //nolint:usetesting // outlives the test
			return
		}
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(built.dir, conf.PluginType), ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("%w\n%s", err, out)
		}
	})
	must(t, built.err)
	return filepath.Join(built.dir, conf.PluginType)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// host is a node's file system: plugins, configuration, state.
type host struct {
	bin, confDir, state, socket string
	cni                         *libcni.CNIConfig
}

const ownNamespace = "raceway-system"

func newHost(t testing.TB) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{
		bin: filepath.Join(dir, "bin"), confDir: filepath.Join(dir, "net.d"),
		state: filepath.Join(dir, "state"), socket: filepath.Join(dir, "run", "cni.sock"),
	}
	must(t, os.Mkdir(h.bin, 0o755))
	must(t, os.Mkdir(h.confDir, 0o755))
	text, err := os.ReadFile(binary(t))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(h.bin, conf.PluginType), text, 0o755))
	self, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(self, filepath.Join(h.bin, headPlugin)))
	h.cni = libcni.NewCNIConfigWithCacheDir([]string{h.bin}, filepath.Join(dir, "cache"), nil)
	h.write(t, fmt.Sprintf(`{"cniVersion":"1.1.0","name":"testnet","plugins":[{"type":%q}]}`, headPlugin))
	return h
}

func (h *host) entry() conf.Entry {
	return conf.Entry{StateDir: h.state, Socket: h.socket, Namespace: ownNamespace}
}

func (h *host) confFile() string { return filepath.Join(h.confDir, "10-testnet.conflist") }

// write makes the configuration of a list, with the plugin at its end.
func (h *host) write(t testing.TB, list string) {
	t.Helper()
	text, err := conf.Insert([]byte(list), h.entry())
	must(t, err)
	must(t, os.WriteFile(h.confFile(), text, 0o644))
}

func (h *host) list(t testing.TB) *libcni.NetworkConfigList {
	t.Helper()
	l, err := libcni.NetworkConfFromFile(h.confFile())
	must(t, err)
	return l
}

// pod is what the runtime says of a sandbox; its network namespace need not exist.
func pod(namespace, name string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: "c-" + name, NetNS: "/nonexistent/" + name, IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", namespace},
			{"K8S_POD_NAME", name},
			{"K8S_POD_INFRA_CONTAINER_ID", "c-" + name},
			{"K8S_POD_UID", "uid-" + name},
		},
	}
}

// agent is a fake one that notes what it is told.
type agent struct {
	captures bool
	hangs    bool
	err      error

	mu   sync.Mutex
	told []string
	last discovery.Sandbox
}

func (a *agent) note(verb string, s discovery.Sandbox) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.told = append(a.told, verb+" "+s.Pod.String())
	a.last = s
}

func (a *agent) Add(ctx context.Context, s discovery.Sandbox) (bool, error) {
	a.note("add", s)
	if a.hangs {
		<-ctx.Done()
	}
	return a.captures, a.err
}

func (a *agent) Check(_ context.Context, s discovery.Sandbox) error {
	a.note("check", s)
	return a.err
}

func (a *agent) Del(_ context.Context, s discovery.Sandbox) error {
	a.note("del", s)
	return a.err
}

func (a *agent) heard() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return strings.Join(a.told, ", ")
}

// serve runs the agent until the test ends.
func (h *host) serve(t testing.TB, a *agent) {
	t.Helper()
	s, err := node.Listen(node.Config{Socket: h.socket, Handler: a, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

const token = "the-plugin's-token"

// apiServer answers with labels by path. A status replaces every answer to the token, ready
// is that of /readyz.
type apiServer struct {
	*httptest.Server
	labels map[string]map[string]string
	status int
	ready  int
}

func newAPI(t testing.TB) *apiServer {
	t.Helper()
	api := &apiServer{ready: http.StatusOK}
	api.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		labels, ok := api.labels[strings.TrimPrefix(q.URL.Path, "/api/v1/namespaces/")]
		switch {
		case q.URL.Path == "/readyz":
			if q.Header.Get("Authorization") != "" {
				t.Error("the token was sent to ask for readiness")
			}
			w.WriteHeader(api.ready)
		case api.status != 0:
			w.WriteHeader(api.status)
		case q.Header.Get("Authorization") != "Bearer "+token:
			w.WriteHeader(http.StatusUnauthorized)
		case !strings.Contains(q.Header.Get("Accept"), "PartialObjectMetadata"):
			t.Errorf("the whole object was asked for: %v", q.Header)
		case !ok:
			w.WriteHeader(http.StatusNotFound)
		default:
			_ = json.NewEncoder(w).Encode(map[string]any{"kind": "PartialObjectMetadata", "metadata": map[string]any{"labels": labels}})
		}
	}))
	api.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	t.Cleanup(api.Close)
	return api
}

func (a *apiServer) where() install.API {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})
	return install.API{Server: a.URL, CA: string(ca), Token: token, Expires: time.Now().Add(time.Hour)}
}

// unreachable is an API server that is not there.
func unreachable(t testing.TB) install.API {
	api := newAPI(t)
	where := api.where()
	api.Close()
	return where
}

var ambient = map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}

// What the head plugin does: an interface when the namespace exists, and a result in any
// case.

func headAdd(args *skel.CmdArgs) error {
	decoder := version.ConfigDecoder{}
	v, err := decoder.Decode(args.StdinData)
	if err != nil {
		return err
	}
	if err := makeLink(args.Netns, args.IfName); err != nil {
		return err
	}
	result, err := headResult(args.Netns).GetAsVersion(v)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := result.PrintTo(&out); err != nil {
		return err
	}
	_, err = os.Stdout.Write(out.Bytes())
	return err
}

func headDel(args *skel.CmdArgs) error { return removeLink(args.Netns, args.IfName) }

func headNothing(*skel.CmdArgs) error { return nil }

// asError returns the plugin's error as the runtime gets it.
func asError(t testing.TB, err error) *types.Error {
	t.Helper()
	var e *types.Error
	if err != nil && !errors.As(err, &e) {
		t.Fatalf("the error is %T: %v", err, err)
	}
	return e
}
