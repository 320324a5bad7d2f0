// Package raceway_test keeps the direction of imports, so that the folders keep telling
// what the system is made of.
package raceway_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/raceway-mesh/raceway"

// pkg is what `go list` says of a package. Tests are not part of it: they may import what
// they like.
type pkg struct {
	ImportPath string
	Standard   bool
	Imports    []string // direct
	Deps       []string // all
}

// own reports whether path is this module's, at or below one of the folders, or anywhere in
// it when there are none.
func own(path string, folders ...string) bool {
	if len(folders) == 0 {
		return within(path, module)
	}
	return slices.ContainsFunc(folders, func(f string) bool { return within(path, module+"/"+f) })
}

func within(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func isKubernetes(path string) bool {
	return within(path, "k8s.io") || within(path, "sigs.k8s.io") || within(path, "istio.io/client-go")
}

// apiCallers may import client-go; perf and e2e test and measure, and are no part of the product.
func apiCallers() []string {
	return []string{"dataplane/discovery/kube", "cmd/raceway/internal/kube", "cmd/raceway-ca/internal/kube", "perf", "e2e"}
}

func isEBPF(path string) bool { return within(path, "github.com/cilium/ebpf") }

// rule forbids imports. A rule on all looks at what a package reaches, otherwise at what it
// names itself.
type rule struct {
	name   string
	reason string
	all    bool
	// forbids reports whether the package from may not import to, which is standard or not.
	forbids func(from, to string, standard bool) bool
}

// purePackages decide and hold, and do nothing: they import the standard library and each
// other. explain answers in the words of admin, which is not pure but stands on the
// standard library alone.
func purePackages() []string {
	return []string{"certs/spiffe", "dataplane/route", "dataplane/authz", "dataplane/enroll", "dataplane/samenode", "dataplane/explain"}
}

func mayBeUsedByPure(path string, standard bool) bool {
	if standard || path == module+"/dataplane" || path == module+"/dataplane/admin" {
		return true
	}
	return slices.ContainsFunc(purePackages(), func(p string) bool { return path == module+"/"+p })
}

func rules() []rule {
	return []rule{
		{
			name: "hbone and certs stand alone", all: true,
			reason: "hbone takes a *tls.Config and net.Conns, certs takes a Signer: they are useful without Raceway, and cannot drag a cluster's vocabulary into a wire protocol",
			forbids: func(from, to string, _ bool) bool {
				return own(from, "hbone", "certs") && (own(to, "dataplane", "bpf", "e2e") || isKubernetes(to) || isEBPF(to))
			},
		},
		{
			name:   "only dataplane/kernel and bpf use cilium/ebpf",
			reason: "programs and maps have one owner, who keeps their layout, pins and order of attachment in step",
			forbids: func(from, to string, _ bool) bool {
				return isEBPF(to) && !own(from, "dataplane/kernel", "bpf")
			},
		},
		{
			name:   "the API server has three callers",
			reason: "the data plane sees a cluster through discovery alone; the CA reviews tokens and the command line finds agents, each in a package of its own, so that a test can stand in for it",
			forbids: func(from, to string, _ bool) bool {
				return within(to, "k8s.io/client-go") && !own(from, apiCallers()...)
			},
		},
		{
			name: "the agent has no clientset", all: true,
			reason: "there is one on every node: every kind of every API group, with its scheme and its OpenAPI, would double its program",
			forbids: func(from, to string, _ bool) bool {
				return from == module+"/cmd/raceway-agent" && (within(to, "k8s.io/client-go/kubernetes") || within(to, "k8s.io/client-go/applyconfigurations") || within(to, "k8s.io/client-go/informers"))
			},
		},
		{
			name: "the CNI plugin stays small", all: true,
			reason: "it is started for each pod of the node, and a kubelet waits for it",
			forbids: func(from, to string, _ bool) bool {
				return from == module+"/cni-plugin" && (within(to, "k8s.io/client-go") || isEBPF(to) || within(to, "google.golang.org/grpc"))
			},
		},
		{
			name:   "nobody imports cmd",
			reason: "commands wire packages together; what two of them need belongs into a package with a name",
			forbids: func(from, to string, _ bool) bool {
				return own(to, "cmd") && !own(from, "cmd")
			},
		},
		{
			name:   "nobody imports perf but the command line",
			reason: "the benchmark harness measures the product and is no part of it; operators measure a machine of theirs with `raceway perf`",
			forbids: func(from, to string, _ bool) bool {
				return own(to, "perf") && !own(from, "perf") && from != module+"/cmd/raceway"
			},
		},
		{
			name: "pure packages use the standard library and each other", all: true,
			reason: "what decides must be testable with tables on any machine: no kernel, no cluster, no clock of others",
			forbids: func(from, to string, standard bool) bool {
				return own(from, purePackages()...) && !mayBeUsedByPure(to, standard)
			},
		},
		{
			name: "dataplane and dataplane/admin stand on the standard library", all: true,
			reason: "they are the vocabulary that every other package speaks, pure ones included",
			forbids: func(from, to string, standard bool) bool {
				vocabulary := from == module+"/dataplane" || from == module+"/dataplane/admin"
				return vocabulary && !mayBeUsedByPure(to, standard)
			},
		},
	}
}

// violations lists every import that a rule forbids.
func violations(packages []pkg) []string {
	standard := make(map[string]bool)
	for _, p := range packages {
		standard[p.ImportPath] = p.Standard
	}
	var found []string
	for _, p := range packages {
		if !own(p.ImportPath) {
			continue
		}
		for _, r := range rules() {
			imports := p.Imports
			if r.all {
				imports = p.Deps
			}
			for _, to := range imports {
				if r.forbids(p.ImportPath, to, standard[to]) {
					found = append(found, fmt.Sprintf("%s imports %s: %s, because %s", p.ImportPath, to, r.name, r.reason))
				}
			}
		}
	}
	return found
}

// emptyNames say nothing of what is in a package, so anything ends up there.
func emptyNames() []string {
	return []string{"util", "utils", "common", "helper", "helpers", "constants", "pkg", "misc"}
}

func misnamed(packages []pkg) []string {
	var found []string
	for _, p := range packages {
		if !own(p.ImportPath) {
			continue
		}
		for _, element := range strings.Split(strings.TrimPrefix(p.ImportPath, module), "/") {
			if slices.Contains(emptyNames(), element) {
				found = append(found, fmt.Sprintf("%s: a folder named %s tells nobody what belongs into it: name it after what it does", p.ImportPath, element))
			}
		}
	}
	return found
}

func listPackages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Standard,Imports,Deps", "./...")
	cmd.Env = append(os.Environ(), "GOOS=linux")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var packages []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return packages
		}
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

func TestImportsGoOneWay(t *testing.T) {
	packages := listPackages(t)
	for _, name := range purePackages() {
		if !slices.ContainsFunc(packages, func(p pkg) bool { return p.ImportPath == module+"/"+name }) {
			t.Errorf("there is no package %s any more: its rules protect nothing", name)
		}
	}
	for _, v := range violations(packages) {
		t.Error(v)
	}
}

func TestPackagesAreNamedAfterWhatTheyDo(t *testing.T) {
	for _, v := range misnamed(listPackages(t)) {
		t.Error(v)
	}
}

func TestPurePackagesBuildOnAnyOS(t *testing.T) {
	args := []string{"build", "./dataplane", "./dataplane/admin"}
	for _, p := range purePackages() {
		args = append(args, "./"+p)
	}
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "GOOS=darwin", "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("pure packages must build where no kernel of ours runs, so that everyone can work on them: %v\n%s", err, out)
	}
}

// TestEachRuleCatchesItsBreach proves that the rules above can fail at all.
func TestEachRuleCatchesItsBreach(t *testing.T) {
	for _, test := range []struct {
		from, to string
		standard bool
		breaches string // name of the rule, "" when the import is allowed
	}{
		{from: "hbone/h2", to: module + "/dataplane", breaches: "hbone and certs stand alone"},
		{from: "certs/istio", to: "k8s.io/apimachinery/pkg/types", breaches: "hbone and certs stand alone"},
		{from: "certs", to: "google.golang.org/grpc"},
		{from: "dataplane/proxy", to: "github.com/cilium/ebpf/link", breaches: "only dataplane/kernel and bpf use cilium/ebpf"},
		{from: "dataplane/kernel", to: "github.com/cilium/ebpf"},
		{from: "cmd/raceway-agent", to: "k8s.io/client-go/rest", breaches: "the API server has three callers"},
		{from: "dataplane/discovery/kube", to: "k8s.io/client-go/rest"},
		{from: "dataplane/agent", to: "k8s.io/client-go/kubernetes", breaches: "the API server has three callers"},
		{from: "cni-plugin", to: "google.golang.org/grpc", breaches: "the CNI plugin stays small"},
		{from: "cmd/raceway", to: "k8s.io/apimachinery/pkg/util/duration"},
		{from: "e2e/lab", to: module + "/cmd/raceway", breaches: "nobody imports cmd"},
		{from: "dataplane/agent", to: module + "/perf", breaches: "nobody imports perf but the command line"},
		{from: "cmd/raceway-agent", to: module + "/perf/report", breaches: "nobody imports perf but the command line"},
		{from: "cmd/raceway", to: module + "/perf"},
		{from: "dataplane/route", to: "golang.org/x/sync/errgroup", breaches: "pure packages use the standard library and each other"},
		{from: "dataplane/explain", to: module + "/dataplane/proxy", breaches: "pure packages use the standard library and each other"},
		{from: "dataplane/explain", to: module + "/dataplane/authz"},
		{from: "dataplane/enroll", to: "log/slog", standard: true},
		{from: "dataplane/admin", to: module + "/dataplane/telemetry", breaches: "dataplane and dataplane/admin stand on the standard library"},
	} {
		t.Run(test.from+" to "+test.to, func(t *testing.T) {
			got := violations([]pkg{
				{ImportPath: module + "/" + test.from, Imports: []string{test.to}, Deps: []string{test.to}},
				{ImportPath: test.to, Standard: test.standard},
			})
			if test.breaches == "" {
				if len(got) > 0 {
					t.Errorf("an import that is allowed is refused: %q", got)
				}
				return
			}
			if len(got) != 1 || !strings.Contains(got[0], test.breaches+", because") {
				t.Errorf("got %q, want a breach of %q with its reason", got, test.breaches)
			}
		})
	}
	if got := misnamed([]pkg{{ImportPath: module + "/dataplane/utils"}, {ImportPath: "k8s.io/utils"}}); len(got) != 1 {
		t.Errorf("misnamed = %q, want our own folder alone", got)
	}
}
