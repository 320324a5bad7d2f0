package file

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

func TestKubectlOutputIsACluster(t *testing.T) {
	r := newRig(t, nil)
	for _, copied := range [][2]string{{"testdata/cluster", r.dir}, {"testdata/status", r.status}} {
		if err := os.CopyFS(copied[1], os.DirFS(copied[0])); err != nil {
			t.Fatal(err)
		}
	}
	r.publishes()
	r.noProblem()
	s := r.last
	web := s.WorkloadAt(netip.MustParseAddr("fd00:10:244:1::5"))
	if web == nil || web.Name.Name != "web-7d4b9c6f5d-x2x9k" || web.Owner != (dataplane.Owner{Kind: "Deployment", Name: "web"}) ||
		!web.Enrolled || !web.Ready || web.NetNS != "/run/netns/web" || web.Identity.String() != "spiffe://cluster.local/ns/shop/sa/web" {
		t.Errorf("web = %+v", web)
	}
	if web.Captured {
		t.Error("web is captured by the word of a node that it is not on")
	}
	db := s.WorkloadAt(netip.MustParseAddr("10.244.2.7"))
	if db == nil || !db.Captured {
		t.Errorf("db = %+v, want it captured", db)
	}
	if log := s.WorkloadNamed(dataplane.Name{Namespace: "shop", Name: "log-8kq2z"}); log == nil || log.Enrolled {
		t.Errorf("log = %+v, want it known and not enrolled", log)
	}
	svc := s.ServiceAt(netip.MustParseAddr("fd00:10:96::2c1f"))
	if svc == nil || svc.Host != "db.shop.svc.cluster.local" || svc.Distribution != dataplane.PreferSameZone || len(svc.Endpoints) != 2 ||
		svc.Endpoints[0].WorkloadUID != db.UID || svc.Endpoints[0].Ports["mysql"] != 3306 {
		t.Errorf("db service = %+v", svc)
	}
	svc = s.Service(dataplane.Name{Namespace: "shop", Name: "web"})
	if svc == nil || len(svc.Endpoints) != 1 || svc.Endpoints[0].Ports["http"] != 8080 || svc.Endpoints[0].Zone != "eu-west-1a" {
		t.Errorf("web service = %+v", svc)
	}
	if p := s.AuthorizationPolicies(); len(p) != 1 || p[0].Invalid != "" || p[0].Rules[0].To[0].Ports[0] != 3306 {
		t.Errorf("authorization policies = %+v", p)
	}
	if p := s.PeerAuthentications(); len(p) != 1 || p[0].Mode != dataplane.MTLSStrict {
		t.Errorf("peer authentications = %+v", p)
	}
	if n := s.Node("worker-2"); n == nil || n.Zone != "eu-west-1b" || !s.InPodCIDR(netip.MustParseAddr("10.244.2.99")) {
		t.Errorf("node = %+v", n)
	}
}

func TestEmptyDirectoryIsAnEmptyCluster(t *testing.T) {
	r := newRig(t, nil)
	r.publishes()
	r.namespaces()
}

func TestNothingIsPublishedUntilEveryFileParses(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a"))
	r.write("b.yaml", denyAll+"spec: twice\n")
	r.rests()
	r.problem("b.yaml", 5, `"spec" already set`)
	r.write("b.yaml", denyAll)
	r.publishes()
	r.noProblem()
	r.namespaces("a")
}

func TestNothingIsPublishedWhileADirectoryIsNotRead(t *testing.T) {
	r := newRig(t, nil)
	r.write("sub/deeper/a.yaml", denyAll)
	r.rests()
	r.problem("sub/deeper", 0, "subdirectories of subdirectories")
	r.remove("sub/deeper")
	r.publishes()
}

func TestNothingIsPublishedWhileAStatusFileIsSpoilt(t *testing.T) {
	r := newRig(t, nil)
	write(t, filepath.Join(r.status, "n1.json"), "{")
	r.rests()
	r.problem("../status/n1.json", 1, "not a status file")
	write(t, filepath.Join(r.status, "n1.json"), `{"node": "n1"}`)
	r.publishes()
}

func TestLastGoodContentStaysInForce(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a"))
	r.write("p.yaml", "# policies\n"+denyAll)
	r.publishes()
	r.write("p.yaml", "# policies\n"+denyAll+"---\nkind: {\n")
	r.rests()
	r.problem("p.yaml", 7, "not valid YAML")
	if len(r.last.AuthorizationPolicies()) != 1 {
		t.Error("the policy is gone")
	}
	// Other files go on.
	r.write("b.yaml", namespace("b"))
	r.publishes()
	r.namespaces("a", "b")
	r.problem("p.yaml", 7, "not valid YAML")
	// A file that goes takes its last good content with it, spoilt or not.
	r.remove("p.yaml")
	r.publishes()
	r.noProblem()
	if len(r.last.AuthorizationPolicies()) != 0 {
		t.Error("the policy is still there")
	}
}

func TestSpoiltFileThatGetsItsContentBackIsNoChange(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a"))
	r.publishes()
	r.write("a.yaml", "kind: {")
	r.rests()
	r.problem("a.yaml", 1, "not valid YAML")
	r.write("a.yaml", namespace("a"))
	r.rests()
	r.noProblem()
}

func TestOnlyAChangeIsPublished(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a"))
	r.publishes()
	r.rests()
	r.write("a.yaml", "# comment\n"+strings.Replace(namespace("a"), "metadata:", "metadata:\n  resourceVersion: '7'", 1))
	r.rests()
	r.rename("a.yaml", "z.yaml")
	r.rests()
	r.write("z.yaml", strings.Replace(namespace("a"), "metadata:", "metadata:\n  labels: {a: b}", 1))
	r.publishes()
	r.remove("z.yaml")
	r.publishes()
	r.namespaces()
}

func TestWhichFilesAreRead(t *testing.T) {
	r := newRig(t, nil)
	for _, name := range []string{
		"b.yml", "c.json", "sub/d.yaml", // read
		".hidden.yaml", ".git/e.yaml", "f.yaml~", "g.yaml.swp", "#h.yaml#", "i.txt", "4913", ".j.yaml.tmp", "sub/.k.yaml",
	} {
		r.write(name, namespace(strings.Trim(strings.ReplaceAll(filepath.Base(name), ".", "-"), "-#~")))
	}
	r.publishes()
	r.noProblem()
	r.namespaces("b-yml", "c-json", "d-yaml")
}

func TestSymbolicLinksAreFollowed(t *testing.T) {
	r := newRig(t, nil)
	// As a ConfigMap volume is laid out and updated.
	r.write("..1/a.yaml", namespace("a"))
	r.write("..2/a.yaml", namespace("b"))
	link := func(to, from string) {
		if err := os.Symlink(to, filepath.Join(r.dir, from)); err != nil {
			t.Fatal(err)
		}
	}
	link("..1", "..data")
	link("..data/a.yaml", "a.yaml")
	r.publishes()
	r.namespaces("a")
	link("..2", "..data_tmp")
	r.rename("..data_tmp", "..data")
	r.publishes()
	r.namespaces("b")
	// A link that leads nowhere is a file that cannot be read, not one that is gone.
	r.remove("..2")
	r.rests()
	r.problem("a.yaml", 0, "no such file")
	r.remove("a.yaml")
	r.publishes()
	r.namespaces()
}

func TestLoopOfDirectoriesEnds(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a"))
	r.publishes()
	if err := os.Symlink(".", filepath.Join(r.dir, "loop")); err != nil {
		t.Fatal(err)
	}
	r.rests()
	if len(r.Problems()) == 0 {
		t.Error("no problem")
	}
	r.namespaces("a")
}

func TestWhatIsNoFileIsReportedAndNotWaitedFor(t *testing.T) {
	r := newRig(t, nil)
	if err := syscall.Mkfifo(filepath.Join(r.dir, "a.yaml"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.rests()
	r.problem("a.yaml", 0, "not a regular file")
}

func TestFileSizeIsBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxFileSize = 100 })
	r.write("a.yaml", namespace("a"))
	r.publishes()
	r.write("a.yaml", namespace("b")+strings.Repeat("#", 100))
	r.rests()
	r.problem("a.yaml", 0, "more than 100")
	r.namespaces("a")
}

func TestFilesOfADirectoryAreBounded(t *testing.T) {
	r := newRig(t, nil)
	r.cluster.maxFiles = 2
	r.write("a.yaml", namespace("a"))
	r.write("b.yaml", namespace("b"))
	r.write("c.yaml", namespace("c"))
	r.rests()
	r.problem("", 0, "more than 2 files")
	r.remove("a.yaml")
	r.publishes()
	r.noProblem()
	r.namespaces("b", "c")
	// Those that were read stay in force, whichever they are.
	r.write("a.yaml", namespace("a"))
	r.publishes()
	r.namespaces("a", "b", "c")
	r.problem("", 0, "more than 2 files")
}

func TestDirectoryThatVanishesLeavesAllInForce(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a"))
	r.publishes()
	r.rename(".", "../elsewhere")
	r.rests()
	r.problem("", 0, "no such file")
	r.write("b.yaml", namespace("b"))
	r.publishes()
	r.noProblem()
	r.namespaces("b")
}

func TestSubdirectoryThatVanishesTakesItsFiles(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a"))
	r.write("sub/b.yaml", namespace("b"))
	r.publishes()
	r.remove("sub")
	r.publishes()
	r.noProblem()
	r.namespaces("a")
}

func TestObjectInTwoFilesIsThatOfTheEarlier(t *testing.T) {
	r := newRig(t, nil)
	r.write("b.yaml", namespace("a")+"  labels: {from: b}\n")
	r.publishes()
	r.write("c.yaml", namespace("x")+"---\n"+namespace("a")+"  labels: {from: c}\n")
	r.publishes()
	r.problem("c.yaml", 6, "Namespace a is in "+filepath.Join(r.dir, "b.yaml")+":1 already")
	from := func(want string) {
		t.Helper()
		if got := r.last.Namespace("a").Labels["from"]; got != want {
			t.Errorf("it is of file %s, want %s", got, want)
		}
	}
	from("b")
	r.write("a.yaml", namespace("a")+"  labels: {from: a}\n")
	r.publishes()
	from("a")
	r.remove("a.yaml")
	r.remove("b.yaml")
	r.publishes()
	from("c")
	r.noProblem()
}

func TestObjectTwiceInAFileIsTheFirst(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a")+"  labels: {at: '1'}\n---\n"+namespace("a")+"  labels: {at: '2'}\n")
	r.publishes()
	r.problem("a.yaml", 7, "a.yaml:1 already")
	if got := r.last.Namespace("a").Labels["at"]; got != "1" {
		t.Errorf("it is the %s.", got)
	}
}

func TestEmptiedFileIsHeldAWhile(t *testing.T) {
	r := newRig(t, nil)
	r.write("p.yaml", denyAll)
	r.publishes()
	r.write("p.yaml", "\n")
	if retry := r.pass(r.watcher, r.store); !retry {
		t.Error("it is not looked at again")
	}
	r.rests()
	if len(r.last.AuthorizationPolicies()) != 1 {
		t.Error("the policy went with the first empty read")
	}
	r.cluster.settle = time.Nanosecond
	r.publishes()
	if len(r.last.AuthorizationPolicies()) != 0 {
		t.Error("the policy is still there")
	}
}

func TestMissingFileIsHeldAWhile(t *testing.T) {
	r := newRig(t, nil)
	r.cluster.linger = time.Hour
	r.write("b.yaml", namespace("b"))
	r.publishes()
	r.remove("b.yaml")
	if retry := r.pass(r.watcher, r.store); !retry {
		t.Error("it is not looked at again")
	}
	r.rests()
	// It is back: it may go again, and is held as long again.
	r.write("b.yaml", namespace("b")+"  labels: {x: z}\n")
	r.publishes()
	// It was renamed: its objects have not two files, and are those of the one that is there.
	r.rename("b.yaml", "c.yaml")
	r.write("c.yaml", namespace("b")+"  labels: {x: c}\n")
	r.publishes()
	r.noProblem()
	if got := r.last.Namespace("b").Labels["x"]; got != "c" {
		t.Errorf("it is of file %s", got)
	}
	r.cluster.linger = time.Nanosecond
	r.rests()
	r.remove("c.yaml")
	r.rests()
	r.publishes()
	r.namespaces()
}

func TestRenamedAndSpoiltFileDoesNotLosePolicies(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", namespace("a")+"---\n"+denyAll)
	r.publishes()
	r.remove("a.yaml")
	r.write("b.yaml", "kind: {\n"+denyAll)
	r.publishes()
	r.namespaces()
	if len(r.last.AuthorizationPolicies()) != 1 {
		t.Error("the policy is gone")
	}
	if got := fmt.Sprint(r.Problems()); !strings.Contains(got, "AuthorizationPolicy shop/deny is in no file any more but stays in force") {
		t.Errorf("problems = %v", got)
	}
	r.write("b.yaml", namespace("b"))
	r.publishes()
	r.noProblem()
	if len(r.last.AuthorizationPolicies()) != 0 {
		t.Error("the policy is still there")
	}
}

func TestInvalidPolicyIsPublishedAndReported(t *testing.T) {
	r := newRig(t, nil)
	r.write("p.yaml", "\n"+strings.Replace(denyAll, "{}", "{rule: []}", 1))
	r.publishes()
	r.problem("p.yaml", 2, `AuthorizationPolicy shop/deny: spec: unknown field "rule"`)
	if p := r.last.AuthorizationPolicies(); len(p) != 1 || p[0].Invalid == "" {
		t.Errorf("policies = %+v", p)
	}
}

func TestStatusOfPods(t *testing.T) {
	r := newRig(t, nil)
	pod := func(name, node, ip string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + ", uid: u-" + name + "}\nspec: {nodeName: " + node +
			"}\nstatus: {phase: Running, podIP: " + ip + "}\n---\n"
	}
	r.write("pods.yaml", pod("a", "n1", "10.0.0.1")+pod("b", "n2", "10.0.0.2"))
	r.publishes()
	captured := func(want ...string) {
		t.Helper()
		var got []string
		for _, w := range r.last.Workloads() {
			if w.Captured {
				got = append(got, w.Name.Name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("captured = %q, want %q", got, want)
		}
	}
	captured()
	status := filepath.Join(r.status, "n1.json")
	write(t, status, `{"node": "n1", "captured": ["u-a", "u-b", "u-c"], "updated": "2026-11-02T10:00:00Z"}`)
	r.publishes()
	captured("a")
	write(t, status, `{"node": "n1", "captured": ["u-a"], "updated": "2026-11-02T10:00:01Z"}`)
	r.rests()
	write(t, status, `{"node": "n1", "captu`)
	r.rests()
	captured("a")
	r.problem("../status/n1.json", 1, "not a status file")
	write(t, filepath.Join(r.status, "n2.json"), `{"node": "n2", "captured": ["u-b"]}`)
	r.publishes()
	captured("a", "b")
	// A pod that is published before its YAML is there counts as soon as it is.
	write(t, status, `{"node": "n1", "captured": ["u-a", "u-c"]}`)
	r.rests()
	r.write("c.yaml", pod("c", "n1", "10.0.0.3"))
	r.publishes()
	captured("a", "b", "c")
	if err := os.Remove(status); err != nil {
		t.Fatal(err)
	}
	r.publishes()
	captured("b")
}

func TestStatusDirectoryWithinTheClusterDirectory(t *testing.T) {
	r := newRig(t, func(c *Config) { c.StatusDir = filepath.Join(c.Dir, "status") })
	r.write("a.yaml", namespace("a"))
	r.write("status/n1.json", `{"node": "n1"}`)
	r.publishes()
	r.noProblem()
}

func TestCopiedUIDIsReported(t *testing.T) {
	r := newRig(t, nil)
	r.write("a.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, uid: u}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: b, uid: u}\n")
	r.publishes()
	r.problem("", 0, "Pod default/b has the UID u of Pod default/a")
}

func TestProblemsAreTold(t *testing.T) {
	var told [][]discovery.Problem
	var logged strings.Builder
	r := newRig(t, func(c *Config) {
		c.OnProblems = func(p []discovery.Problem) { told = append(told, p) }
		c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	})
	r.write("a.yaml", "kind: {")
	r.rests()
	r.rests()
	r.write("a.yaml", namespace("a"))
	r.publishes()
	r.rests()
	if len(told) != 2 || len(told[0]) != 1 || len(told[1]) != 0 {
		t.Errorf("told = %v, want one problem and then none", told)
	}
	if got := told[0][0].String(); !strings.HasPrefix(got, filepath.Join(r.dir, "a.yaml")+":1: not valid YAML") {
		t.Errorf("problem = %s", got)
	}
	for want, times := range map[string]int{
		"problem in the cluster directory": 1, "problem solved": 1, "nothing is published": 1,
	} {
		if got := strings.Count(logged.String(), want); got != times {
			t.Errorf("%q was logged %d times, want %d", want, got, times)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	write(t, file, "")
	cases := []struct {
		name   string
		config Config
		want   string
	}{
		{"no directory", Config{Log: log}, "cluster directory is not set"},
		{"no logger", Config{Dir: dir}, "no logger"},
		{"one directory for both", Config{Dir: dir, StatusDir: dir + "/.", Log: log}, "both"},
		{"negative", Config{Dir: dir, Log: log, Resync: -1}, "negative"},
		{"no such directory", Config{Dir: dir + "/x", Log: log}, "no such file"},
		{"a file", Config{Dir: file, Log: log}, "not a directory"},
		{"a status directory that cannot be", Config{Dir: dir, StatusDir: file, Log: log}, "status directory"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, err := New(c.config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v, want it to say %q", err, c.want)
			}
		})
	}
	if _, err := New(Config{Dir: dir, Log: log}); err != nil {
		t.Errorf("the smallest configuration: %v", err)
	}
}
