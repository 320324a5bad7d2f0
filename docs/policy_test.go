// Package docs holds what users read. Its tests hold the pages to the code.
package docs

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
)

func page(t *testing.T, name string) []string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(data), "\n")
}

// example is a block of YAML with what stands below it: issues as quotations, and a table
// of verdicts.
type example struct {
	line   int
	yaml   string
	issues []string
	rows   [][]string
}

func examples(t *testing.T) (cluster string, list []example) {
	t.Helper()
	lines := page(t, "policy.md")
	for i := 0; i < len(lines); i++ {
		switch line := lines[i]; {
		case line == "```yaml":
			end := i + slices.Index(lines[i:], "```")
			e := example{line: i + 1, yaml: strings.Join(lines[i+1:end], "\n")}
			switch lines[i-1] {
			case "<!-- cluster -->":
				cluster = e.yaml
			case "<!-- networkpolicy -->": // not Raceway's to judge
			default:
				list = append(list, e)
			}
			i = end
		case len(list) == 0:
		case strings.HasPrefix(line, "> "):
			last := &list[len(list)-1]
			last.issues = append(last.issues, line[2:])
		case strings.HasPrefix(line, "| from | to |"):
			last := &list[len(list)-1]
			for i += 2; strings.HasPrefix(lines[i], "|"); i++ {
				last.rows = append(last.rows, cells(lines[i]))
			}
		}
	}
	return cluster, list
}

func cells(row string) []string {
	fields := strings.Split(strings.Trim(row, "| "), "|")
	for i := range fields {
		fields[i] = strings.TrimSpace(fields[i])
	}
	return fields
}

// load reads the YAML as an agent does.
func load(t *testing.T, texts ...string) *dataplane.Snapshot {
	t.Helper()
	dir := t.TempDir()
	for i, text := range texts {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	source, err := file.New(file.Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var store dataplane.Store
	done := make(chan error, 1)
	go func() { done <- source.Run(ctx, &store) }()
	for {
		snapshot, changed := store.Load()
		if snapshot == nil {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				t.Fatalf("nothing was published: %v", source.Problems())
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return snapshot
	}
}

func TestPolicyExamplesGiveTheirVerdicts(t *testing.T) {
	cluster, list := examples(t)
	if cluster == "" || len(list) < 10 {
		t.Fatalf("the page has a cluster of %d bytes and %d examples: the test no longer understands it", len(cluster), len(list))
	}
	for _, e := range list {
		t.Run(fmt.Sprintf("line %d", e.line), func(t *testing.T) {
			if len(e.rows) == 0 {
				t.Fatal("the example has no verdicts")
			}
			snapshot := load(t, cluster, e.yaml)
			if got := issues(snapshot); !slices.Equal(got, e.issues) {
				t.Errorf("issues %q, the page says %q", got, e.issues)
			}
			for _, row := range e.rows {
				if got := verdict(t, snapshot, row[0], row[1]); !slices.Equal(got, row[2:]) {
					t.Errorf("%s to %s: %q, the page says %q", row[0], row[1], got, row[2:])
				}
			}
		})
	}
}

func issues(s *dataplane.Snapshot) []string {
	var all []string
	for i := range s.AuthorizationPolicies() {
		all = append(all, authz.Issues(&s.AuthorizationPolicies()[i])...)
	}
	for i := range s.PeerAuthentications() {
		all = append(all, authz.AuthenticationIssues(s, &s.PeerAuthentications()[i])...)
	}
	return all
}

// verdict evaluates "namespace/pod", "namespace/pod in clear" or "address in clear" to
// "namespace/pod:port", in the page's words.
func verdict(t *testing.T, s *dataplane.Snapshot, from, to string) []string {
	t.Helper()
	destination, port, _ := strings.Cut(to, ":")
	target := workload(t, s, destination)
	var r authz.Request
	var err error
	if r.Destination, err = netip.ParseAddrPort(target.Addrs[0].String() + ":" + port); err != nil {
		t.Fatal(err)
	}
	source, plain := strings.CutSuffix(from, " in clear")
	if r.Source, err = netip.ParseAddr(source); err != nil {
		w := workload(t, s, source)
		r.Source = w.Addrs[0]
		if !plain {
			r.Peer = w.Identity
		}
	}
	v := authz.Compile(s, target).Evaluate(r)
	answer := "denied"
	if v.Allowed {
		answer = "allowed"
	}
	if slices.ContainsFunc(v.DryRun, func(d authz.DryRun) bool { return d.WouldDeny }) {
		answer += ", would be denied"
	}
	switch {
	case v.Kind == "":
		return []string{answer, "nothing"}
	case v.Rule < 0:
		return []string{answer, v.Policy.String()}
	}
	return []string{answer, fmt.Sprintf("%s rule %d", v.Policy, v.Rule)}
}

func workload(t *testing.T, s *dataplane.Snapshot, name string) *dataplane.Workload {
	t.Helper()
	for i := range s.Workloads() {
		if w := &s.Workloads()[i]; w.Name.String() == name {
			return w
		}
	}
	t.Fatalf("the page's cluster has no pod %s", name)
	return nil
}
