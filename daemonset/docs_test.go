package daemonset_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the table of values into docs/install.md")

const installPage = "../docs/install.md"

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// table returns the lines of the table below <!-- mark -->, and where they are in the page.
func table(t *testing.T, page, mark string) (text string, from, to int) {
	t.Helper()
	mark = "<!-- " + mark + " -->\n"
	from = strings.Index(page, mark)
	if from < 0 {
		t.Fatalf("there is no %s", mark)
	}
	from += len(mark)
	to = from
	for line := range strings.Lines(page[from:]) {
		if !strings.HasPrefix(line, "|") {
			break
		}
		to += len(line)
	}
	return page[from:to], from, to
}

// column returns what stands in backquotes in a column of the table.
func column(t *testing.T, page, mark string, n int) []string {
	t.Helper()
	text, _, _ := table(t, page, mark)
	var all []string
	for _, line := range strings.Split(strings.TrimSpace(text), "\n")[2:] {
		cell := strings.Split(line, "|")[n]
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
			all = append(all, m[1])
		}
	}
	return all
}

// documentedValues makes a table of values.yaml: each comment that begins with -- is of the
// key below it.
func documentedValues(t *testing.T) string {
	t.Helper()
	source := read(t, "chart/values.yaml")
	values := map[string]any{}
	if err := yaml.UnmarshalStrict([]byte(source), &values); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString("| value | default | meaning |\n|---|---|---|\n")
	key := regexp.MustCompile(`^( *)([A-Za-z]+):`)
	var path []string
	comment := ""
	for line := range strings.Lines(source) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "# -- "); ok {
			comment = text
			continue
		}
		m := key.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if depth := len(m[1]) / 2; depth <= len(path) {
			path = append(path[:depth], m[2])
		}
		if comment == "" {
			continue
		}
		value := lookup(values, path)
		encoded, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", strings.Join(path, "."), encoded, strings.ReplaceAll(comment, "|", `\|`))
		comment = ""
	}
	return b.String()
}

func lookup(values map[string]any, path []string) any {
	var value any = values
	for _, name := range path {
		inside, _ := value.(map[string]any)
		value = inside[name]
	}
	return value
}

func TestPageHasTheValues(t *testing.T) {
	page := read(t, installPage)
	got, from, to := table(t, page, "values")
	want := documentedValues(t)
	if got == want {
		return
	}
	if !*update {
		t.Fatalf("docs/install.md has other values than values.yaml: go test ./daemonset -update\n%s", want)
	}
	if err := os.WriteFile(installPage, []byte(page[:from]+want+page[to:]), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestEveryValueIsDocumented down to maps that are given whole, such as resources.
func TestEveryValueIsDocumented(t *testing.T) {
	documented := column(t, documentedMark(t), "values", 1)
	values := map[string]any{}
	if err := yaml.UnmarshalStrict([]byte(read(t, "chart/values.yaml")), &values); err != nil {
		t.Fatal(err)
	}
	var walk func(path string, value any)
	walk = func(path string, value any) {
		if slices.Contains(documented, path) {
			return
		}
		below, ok := value.(map[string]any)
		if !ok || len(below) == 0 {
			t.Errorf("%s has no comment", path)
		}
		for name, value := range below {
			walk(strings.TrimPrefix(path+"."+name, "."), value)
		}
	}
	walk("", values)
}

func documentedMark(t *testing.T) string {
	t.Helper()
	return "<!-- values -->\n" + documentedValues(t)
}

func TestPageHasCapabilitiesAndMounts(t *testing.T) {
	page := read(t, installPage)
	spec := find[*appsv1.DaemonSet](render(t, "chart"), "raceway-agent").Spec.Template.Spec
	var capabilities []string
	for _, c := range spec.Containers[0].SecurityContext.Capabilities.Add {
		capabilities = append(capabilities, string(c))
	}
	if got := column(t, page, "capabilities", 1); !slices.Equal(got, capabilities) {
		t.Errorf("the page has the capabilities %q, the chart %q", got, capabilities)
	}
	template := read(t, "chart/templates/agent/daemonset.yaml")
	for _, c := range capabilities {
		if !regexp.MustCompile(`(?m)^ +- ` + c + ` # \w`).MatchString(template) {
			t.Errorf("the chart does not say why %s", c)
		}
	}
	var hostPaths, mountPaths []string
	for _, v := range spec.Volumes {
		if v.HostPath == nil {
			continue
		}
		hostPaths = append(hostPaths, v.HostPath.Path)
		for _, m := range spec.Containers[0].VolumeMounts {
			if m.Name == v.Name {
				mountPaths = append(mountPaths, m.MountPath)
			}
		}
	}
	if got := column(t, page, "mounts", 1); !slices.Equal(got, hostPaths) {
		t.Errorf("the page has the host's paths %q, the chart %q", got, hostPaths)
	}
	if got := column(t, page, "mounts", 2); !slices.Equal(got, mountPaths) {
		t.Errorf("the page has the mounts %q, the chart %q", got, mountPaths)
	}
}

// TestPageHasTheRights compares "resource verb" of the page with the roles.
func TestPageHasTheRights(t *testing.T) {
	page := read(t, "../docs/security.md")
	objects := render(t, "chart")
	for _, account := range []string{"raceway-agent", "raceway-cni", "raceway-uninstall"} {
		text, _, _ := table(t, page, "rights: "+account)
		var got []string
		for _, line := range strings.Split(strings.TrimSpace(text), "\n")[2:] {
			cells := strings.Split(line, "|")
			resources, names, _ := strings.Cut(cells[1], ", in its namespace")
			name := strings.Trim(strings.TrimSuffix(strings.TrimSpace(names), " alone"), "` ")
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(resources, -1) {
				for verb := range strings.SplitSeq(cells[2], ",") {
					got = append(got, strings.TrimSpace(m[1]+" "+strings.TrimSpace(verb)+" "+name))
				}
			}
		}
		var want []string
		for _, right := range rights(objects, account) {
			want = append(want, strings.Join(strings.Fields(right)[2:], " "))
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("the page says that %s may\n%s\nand the chart\n%s", account, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestAlertsAndDashboardUseMetricsThatExist, which the page on telemetry is held to.
func TestAlertsAndDashboardUseMetricsThatExist(t *testing.T) {
	page := read(t, "../docs/telemetry.md")
	known := slices.Concat(column(t, page, "metrics: connections", 1), column(t, page, "metrics: own", 1), column(t, page, "metrics: ca", 1))
	name := regexp.MustCompile(`\b(?:raceway|istio)_[a-z_]+`)
	for _, path := range []string{"chart/monitoring/alerts.yaml", "chart/monitoring/dashboard.json"} {
		found := name.FindAllString(read(t, path), -1)
		if len(found) < 5 {
			t.Errorf("%s: only the metrics %q", path, found)
		}
		for _, metric := range found {
			if !slices.Contains(known, metric) && !slices.Contains(known, strings.TrimSuffix(metric, "_bucket")) {
				t.Errorf("%s: there is no metric %s", path, metric)
			}
		}
	}
	var dashboard map[string]any
	if err := json.Unmarshal([]byte(read(t, "chart/monitoring/dashboard.json")), &dashboard); err != nil {
		t.Error(err)
	}
}
