package main_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/cni-plugin/install"
	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane"
)

// known is what the node knew last: shop is enrolled, blog is not.
func known() install.Cluster {
	return install.Cluster{
		EnrollLabels: []string{"istio.io/dataplane-mode"},
		Namespaces:   map[string]map[string]string{"shop": ambient, "blog": {}, "istio": {"istio.io/dataplane-mode": "ambient"}, "kube-public": {}, ownNamespace: ambient},
		Pods:         map[string]map[string]string{"uid-out": {dataplane.ModeLabel: dataplane.ModeNone}, "uid-in": ambient},
	}
}

func TestAddAsksTheAgentAndPassesTheResultOn(t *testing.T) {
	for _, cniVersion := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(cniVersion, func(t *testing.T) {
			h := newHost(t)
			h.write(t, fmt.Sprintf(`{"cniVersion":%q,"name":"testnet","plugins":[{"type":%q}]}`, cniVersion, headPlugin))
			a := &agent{captures: true}
			h.serve(t, a)
			result, err := h.cni.AddNetworkList(t.Context(), h.list(t), pod("shop", "web"))
			must(t, err)
			got, err := types100.NewResultFromResult(result)
			must(t, err)
			if result.Version() != cniVersion || len(got.IPs) != 3 || len(got.Interfaces) != 2 {
				t.Errorf("the result is %s %+v", result.Version(), got)
			}
			s := a.last
			if a.heard() != "add shop/web" || s.UID != "uid-web" || s.NetNS != "/nonexistent/web" ||
				!reflect.DeepEqual(s.Addrs, []netip.Addr{netip.MustParseAddr(headAddress), netip.MustParseAddr("fd99::2")}) {
				t.Errorf("the agent heard %s of %+v", a.heard(), s)
			}
		})
	}
}

// TestAdd is the table of docs/cni.md.
func TestAdd(t *testing.T) {
	up := func(labels map[string]map[string]string) func(testing.TB) install.API {
		return func(t testing.TB) install.API {
			api := newAPI(t)
			api.labels = labels
			return api.where()
		}
	}
	answering := func(status, ready int) func(testing.TB) install.API {
		return func(t testing.TB) install.API {
			api := newAPI(t)
			api.status, api.ready = status, ready
			return api.where()
		}
	}
	withPod := func(namespace, own map[string]string) func(testing.TB) install.API {
		return up(map[string]map[string]string{"shop": namespace, "shop/pods/web": own})
	}
	optOut := map[string]string{dataplane.ModeLabel: dataplane.ModeNone}
	gone := errors.New("attach: no such device")
	cases := map[string]*addCase{
		"agent captures":                             {agent: &agent{captures: true}, asked: true},
		"agent leaves it":                            {agent: &agent{}, asked: true},
		"agent fails":                                {agent: &agent{err: gone}, asked: true, says: []string{"pod shop/web", "has not captured it", "no such device"}},
		"agent not ready, enrolled":                  {agent: &agent{err: node.ErrNotReady}, asked: true, api: withPod(ambient, nil), says: []string{"not seen the cluster yet", "says the API server"}},
		"agent not ready, not enrolled":              {agent: &agent{err: node.ErrNotReady}, asked: true, api: withPod(nil, nil)},
		"agent not ready, API knows no plugin (401)": {agent: &agent{err: node.ErrNotReady}, asked: true, api: answering(401, 200), says: []string{"what this node knew last"}},
		"agent hangs, enrolled":                      {agent: &agent{hangs: true}, asked: true, api: withPod(ambient, nil), says: []string{"deadline exceeded", "says the API server"}},
		"agent hangs, not enrolled":                  {agent: &agent{hangs: true}, asked: true, api: withPod(nil, nil)},
		"own namespace, agent fails":                 {agent: &agent{err: gone}, pod: ownNamespace + "/agent"},
		"own namespace, agent away, enrolled":        {pod: ownNamespace + "/agent"},
		"own namespace, no state":                    {pod: ownNamespace + "/agent", noState: true},
		"API: enrolled by its namespace":             {api: withPod(ambient, nil), says: []string{"not running on this node", "held up", "says the API server", "kubectl -n raceway-system get pods -o wide"}},
		"API: namespace not enrolled":                {api: withPod(nil, nil)},
		"API: pod opts out":                          {api: withPod(ambient, optOut)},
		"API: pod opts in":                           {api: withPod(nil, ambient), says: []string{"says the API server"}},
		"API: another label enrols":                  {api: withPod(map[string]string{"istio.io/dataplane-mode": "ambient"}, nil), says: []string{"says the API server"}},
		"API: enrolled since the last state":         {api: up(map[string]map[string]string{"blog": ambient, "blog/pods/web": {}}), pod: "blog/web", says: []string{"says the API server"}},
		"API: static pod that it does not have":      {api: up(map[string]map[string]string{"shop": ambient}), says: []string{"says the API server"}},
		"API: has no such namespace":                 {api: up(nil), pod: "new/web", says: []string{"nobody knows", "newer than"}},
		"API says no (403), enrolled":                {api: answering(403, 200), says: []string{"what this node knew last", "403"}},
		"API fails (500), not enrolled":              {api: answering(500, 500), pod: "blog/web"},
		"API unwell (401, not ready), enrolled":      {api: answering(401, 500), says: []string{"takes no token and is not ready"}},
		"API away: enrolled by its namespace":        {api: unreachable, says: []string{"what this node knew last", "connection refused"}},
		"API away: by another label":                 {api: unreachable, pod: "istio/web", says: []string{"what this node knew last"}},
		"API away: namespace not enrolled":           {api: unreachable, pod: "blog/web"},
		"API away: pod opted out":                    {api: unreachable, pod: "shop/out"},
		"API away: pod opted in":                     {api: unreachable, pod: "blog/in", says: []string{"what this node knew last"}},
		"API away: namespace unknown":                {api: unreachable, pod: "new/web", says: []string{"nobody knows", "newer than"}},
		"API away: namespace unknown and exempt":     {api: unreachable, pod: "kube-system/dns"},
		"API away: released":                         {api: unreachable, released: true},
		"state lost":                                 {noState: true, says: []string{"nobody knows", "state.json"}},
		"API with a certificate of another":          {api: impostor, says: []string{"what this node knew last", "certificate"}},
		"API with a token that has expired":          {api: expiredToken, says: []string{"expired"}},
	}
	for _, test := range cases {
		test.begin(t)
	}
	for name, test := range cases {
		t.Run(name, test.judge)
	}
}

// addCase is a row of the table.
type addCase struct {
	agent    *agent
	api      func(testing.TB) install.API
	pod      string // namespace/name; shop/web by default
	released bool
	noState  bool
	says     []string // of the error; none means that the pod starts
	asked    bool     // whether the agent is asked

	host   *host
	answer chan error
}

// begin starts an ADD beside the others: many of them wait for an agent that does not come.
func (c *addCase) begin(t *testing.T) {
	h := newHost(t)
	c.host, c.answer = h, make(chan error, 1)
	if c.agent != nil {
		h.serve(t, c.agent)
	}
	state := install.State{ConfDir: h.confDir, Exempt: []string{"kube-system"}, Cluster: known()}
	state.Cluster.Released = c.released
	if c.api != nil {
		state.API = c.api(t)
	}
	if !c.noState {
		must(t, install.WriteState(h.state, state))
	}
	if c.pod == "" {
		c.pod = "shop/web"
	}
	namespace, name, _ := strings.Cut(c.pod, "/")
	list := h.list(t)
	go func() {
		_, err := h.cni.AddNetworkList(context.Background(), list, pod(namespace, name))
		c.answer <- err
	}()
}

func (c *addCase) judge(t *testing.T) {
	err := <-c.answer
	got := asError(t, err)
	if (got != nil) != (len(c.says) > 0) {
		t.Fatalf("ADD = %v, want an error: %v", err, len(c.says) > 0)
	}
	for _, words := range c.says {
		if got.Code != types.ErrTryAgainLater || !strings.Contains(got.Msg, words) {
			t.Errorf("the error is %d %q, want %d with %q", got.Code, got.Msg, types.ErrTryAgainLater, words)
		}
	}
	if c.agent != nil && (c.agent.heard() != "") != c.asked {
		t.Errorf("the agent heard %q", c.agent.heard())
	}
	if _, err := os.Stat(filepath.Join(c.host.bin, conf.PluginType)); err != nil {
		t.Errorf("the plugin has removed itself: %v", err)
	}
}

// impostor answers in the place of an API server, and says that nothing is enrolled.
func impostor(t testing.TB) install.API {
	api := newAPI(t)
	api.labels = map[string]map[string]string{"shop": {}, "shop/pods/web": {}}
	where := api.where()
	where.CA = string(certstest.PEM(certstest.New(t, "elsewhere").Root.Raw))
	return where
}

func expiredToken(t testing.TB) install.API {
	api := newAPI(t)
	api.status = http.StatusUnauthorized
	where := api.where()
	where.Expires = time.Now().Add(-time.Minute)
	return where
}

func TestPluginOfAnUninstalledMeshRemovesItself(t *testing.T) {
	for name, change := range map[string]func(*apiServer, *install.API){
		"ready":                      func(*apiServer, *install.API) {},
		"nobody may ask without one": func(api *apiServer, _ *install.API) { api.ready = http.StatusUnauthorized },
		"token without an expiry":    func(_ *apiServer, where *install.API) { where.Expires = time.Time{} },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			api := newAPI(t)
			api.status = http.StatusUnauthorized
			where := api.where()
			change(api, &where)
			snapshot := filepath.Join(filepath.Dir(h.state), "snapshot.json.gz")
			must(t, os.WriteFile(snapshot, nil, 0o600))
			must(t, install.WriteState(h.state, install.State{API: where, ConfDir: h.confDir, Files: []string{snapshot, snapshot + ".none"}, Cluster: known()}))
			if _, err := h.cni.AddNetworkList(t.Context(), h.list(t), pod("shop", "web")); err != nil {
				t.Fatalf("ADD = %v", err)
			}
			text, err := os.ReadFile(h.confFile())
			must(t, err)
			if want := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"testnet","plugins":[{"type":%q}]}`, headPlugin); string(text) != want {
				t.Errorf("the configuration is %s, want %s", text, want)
			}
			for _, path := range []string{snapshot, h.state, filepath.Join(h.bin, conf.PluginType)} {
				if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", path, err)
				}
			}
		})
	}
}

// TestForeignStateDeletesNothingElsewhere has an entry whose state somebody else wrote, as a
// tenant's NetworkAttachmentDefinition can, with an API server and an absent agent of their own.
func TestForeignStateDeletesNothingElsewhere(t *testing.T) {
	h := newHost(t)
	api := newAPI(t)
	api.status = http.StatusUnauthorized
	elsewhere := filepath.Join(t.TempDir(), "passwd")
	must(t, os.WriteFile(elsewhere, nil, 0o600))
	home := filepath.Dir(h.state)
	must(t, os.Symlink(filepath.Dir(elsewhere), filepath.Join(home, "link")))
	must(t, install.WriteState(h.state, install.State{API: api.where(), ConfDir: h.confDir, Cluster: known(), Files: []string{
		elsewhere, filepath.Join(home, "link", "passwd"), home + "/../" + filepath.Base(home) + "/link/passwd",
	}}))
	if _, err := h.cni.AddNetworkList(t.Context(), h.list(t), pod("shop", "web")); err != nil {
		t.Fatalf("ADD = %v", err)
	}
	if _, err := os.Lstat(h.state); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state is left: %v", err)
	}
	if _, err := os.Lstat(elsewhere); err != nil {
		t.Errorf("a file elsewhere was deleted: %v", err)
	}

	// A state directory behind a link that leads out of where it seems to be.
	h = newHost(t)
	real := t.TempDir()
	must(t, install.WriteState(real, install.State{API: api.where(), ConfDir: h.confDir, Cluster: known()}))
	must(t, os.Symlink(real, h.state))
	if _, err := h.cni.AddNetworkList(t.Context(), h.list(t), pod("shop", "web")); err != nil {
		t.Fatalf("ADD = %v", err)
	}
	if _, err := os.Lstat(filepath.Join(real, "state.json")); err != nil {
		t.Errorf("the state elsewhere was deleted: %v", err)
	}
}

func TestAddWaitsForAnAgentThatRestarts(t *testing.T) {
	h := newHost(t)
	must(t, install.WriteState(h.state, install.State{Cluster: known()}))
	a := &agent{captures: true}
	list := h.list(t)
	done := make(chan error, 1)
	go func() {
		_, err := h.cni.AddNetworkList(context.Background(), list, pod("shop", "web"))
		done <- err
	}()
	time.Sleep(500 * time.Millisecond)
	h.serve(t, a)
	if err := <-done; err != nil || a.heard() != "add shop/web" {
		t.Errorf("ADD = %v; the agent heard %q", err, a.heard())
	}
}

func TestPodsOutsideTheMeshDoNotWaitForTheAgent(t *testing.T) {
	h := newHost(t)
	must(t, install.WriteState(h.state, install.State{Cluster: known()}))
	begin := time.Now()
	_, err := h.cni.AddNetworkList(t.Context(), h.list(t), pod("blog", "web"))
	must(t, err)
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("ADD took %v", took)
	}
}

func TestWhatIsNoPodPasses(t *testing.T) {
	h := newHost(t)
	a := &agent{err: errors.New("asked")}
	h.serve(t, a)
	rt := pod("", "")
	rt.ContainerID = "c1"
	for _, args := range [][][2]string{nil, {{"IgnoreUnknown", "1"}, {"FOO", "bar"}}} {
		rt.Args = args
		if _, err := h.cni.AddNetworkList(t.Context(), h.list(t), rt); err != nil {
			t.Errorf("ADD with %v = %v", args, err)
		}
		must(t, h.cni.CheckNetworkList(t.Context(), h.list(t), rt))
		must(t, h.cni.DelNetworkList(t.Context(), h.list(t), rt))
	}
	if a.heard() != "" {
		t.Errorf("the agent heard %q", a.heard())
	}
	rt.Args = [][2]string{{"K8S_POD_NAME", "web"}}
	if _, err := h.cni.AddNetworkList(t.Context(), h.list(t), rt); err == nil || !strings.Contains(err.Error(), "half a pod") {
		t.Errorf("ADD of half a pod = %v", err)
	}
}

func TestAddNeedsAResultBefore(t *testing.T) {
	h := newHost(t)
	text := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"n","plugins":[{"type":%q,"stateDir":%q,"socket":%q}]}`, conf.PluginType, h.state, h.socket)
	list, err := libcni.NetworkConfFromBytes([]byte(text))
	must(t, err)
	_, err = h.cni.AddNetworkList(t.Context(), list, pod("shop", "web"))
	if e := asError(t, err); e == nil || e.Code != types.ErrInvalidNetworkConfig || !strings.Contains(e.Msg, "without a result") {
		t.Errorf("ADD = %v", err)
	}
}

func TestCheck(t *testing.T) {
	for name, test := range map[string]struct {
		agent *agent
		pod   string
		code  uint
		says  string
	}{
		"in force":                {agent: &agent{}, pod: "shop/web"},
		"not in force":            {agent: &agent{err: errors.New("program is gone")}, pod: "shop/web", code: types.ErrInternal, says: "program is gone"},
		"agent away, enrolled":    {pod: "shop/web", code: types.ErrTryAgainLater, says: "cannot say whether"},
		"agent away, not to be":   {pod: "blog/web"},
		"agent's own namespace":   {pod: ownNamespace + "/agent"},
		"agent away, not known":   {pod: "new/web", code: types.ErrTryAgainLater, says: "nobody knows"},
		"agent sees no cluster":   {agent: &agent{err: node.ErrNotReady}, pod: "shop/web", code: types.ErrTryAgainLater, says: "not seen the cluster"},
		"agent sees none, not to": {agent: &agent{err: node.ErrNotReady}, pod: "blog/web"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			must(t, install.WriteState(h.state, install.State{Cluster: known()}))
			namespace, podName, _ := strings.Cut(test.pod, "/")
			rt := pod(namespace, podName)
			// The runtime checks with the result that it remembers.
			h.remember(t, rt)
			if test.agent != nil {
				h.serve(t, test.agent)
			}
			err := h.cni.CheckNetworkList(t.Context(), h.list(t), rt)
			e := asError(t, err)
			if test.code == 0 && e != nil || test.code != 0 && (e == nil || e.Code != test.code || !strings.Contains(e.Msg, test.says)) {
				t.Errorf("CHECK = %#v, want %d with %q", e, test.code, test.says)
			}
		})
	}
}

// remember adds the pod with the head plugin alone, for libcni to have its result.
func (h *host) remember(t *testing.T, rt *libcni.RuntimeConf) {
	t.Helper()
	list, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion":"1.1.0","name":"testnet","plugins":[{"type":%q}]}`, headPlugin))
	must(t, err)
	_, err = h.cni.AddNetworkList(t.Context(), list, rt)
	must(t, err)
}

func TestDelSucceedsWhateverThereIs(t *testing.T) {
	h := newHost(t)
	rt := pod("shop", "web")
	for range 2 {
		must(t, h.cni.DelNetworkList(t.Context(), h.list(t), rt))
	}
	rt.NetNS = "" // as after a reboot
	must(t, h.cni.DelNetworkList(t.Context(), h.list(t), rt))
	rt.Args = [][2]string{{"K8S_POD_NAME", "web"}}
	must(t, h.cni.DelNetworkList(t.Context(), h.list(t), rt))
	a := &agent{err: errors.New("busy")}
	h.serve(t, a)
	for range 2 {
		must(t, h.cni.DelNetworkList(t.Context(), h.list(t), pod("shop", "web")))
	}
	if a.heard() != "del shop/web, del shop/web" {
		t.Errorf("the agent heard %q", a.heard())
	}
}

func TestStatusAndGCSucceedWithoutTheAgent(t *testing.T) {
	h := newHost(t)
	must(t, h.cni.GetStatusNetworkList(t.Context(), h.list(t)))
	must(t, h.cni.GCNetworkList(t.Context(), h.list(t), &libcni.GCArgs{}))
	versions, err := h.cni.GetVersionInfo(t.Context(), conf.PluginType)
	must(t, err)
	if got := versions.SupportedVersions(); !strings.Contains(strings.Join(got, " "), "0.3.1 0.4.0 1.0.0 1.1.0") {
		t.Errorf("VERSION = %v", got)
	}
}

func TestHeldUpPodStartsAsSoonAsTheAgentIsThere(t *testing.T) {
	h := newHost(t)
	must(t, install.WriteState(h.state, install.State{Cluster: known()}))
	begin := time.Now()
	_, err := h.cni.AddNetworkList(t.Context(), h.list(t), pod("shop", "web"))
	if e := asError(t, err); e == nil || e.Code != types.ErrTryAgainLater {
		t.Fatalf("ADD = %v", err)
	}
	if took := time.Since(begin); took < 5*time.Second || took > 15*time.Second {
		t.Errorf("ADD gave up after %v", took)
	}
	h.serve(t, &agent{captures: true})
	// The runtime takes the sandbox down and makes another.
	must(t, h.cni.DelNetworkList(t.Context(), h.list(t), pod("shop", "web")))
	_, err = h.cni.AddNetworkList(t.Context(), h.list(t), pod("shop", "web"))
	must(t, err)
}
