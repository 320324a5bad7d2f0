package raceway_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// page is a Markdown file of the repository.
type page struct {
	path  string
	text  string
	code  []string // the command lines of fenced blocks
	spans []string // `inline`
}

var (
	fence  = regexp.MustCompile("(?ms)^ *```[a-z]*\n(.*?)^ *```")
	span   = regexp.MustCompile("`([^`\n]+)`")
	anchor = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	goal   = regexp.MustCompile(`^(?:#|\$)?\s*make ([a-z0-9-]+)`)
	flag   = regexp.MustCompile(`(?:^|\s)--([a-z][a-z0-9-]*)`)

	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	dropped = regexp.MustCompile(`[^\p{L}\p{N}_-]`) // from a heading, where a link leads to it
)

func pages(t *testing.T) []page {
	t.Helper()
	list, err := exec.CommandContext(t.Context(), "git", "ls-files", "*.md").Output()
	if err != nil {
		t.Skipf("not a git checkout: %v", err)
	}
	var found []page
	for _, path := range strings.Fields(string(list)) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p := page{path: path, text: string(data)}
		for _, block := range fence.FindAllStringSubmatch(p.text, -1) {
			p.code = append(p.code, strings.Split(strings.ReplaceAll(block[1], "\\\n", " "), "\n")...)
		}
		for _, s := range span.FindAllStringSubmatch(fence.ReplaceAllString(p.text, ""), -1) {
			p.spans = append(p.spans, s[1])
		}
		found = append(found, p)
	}
	if len(found) < 3 {
		t.Fatalf("only %d pages", len(found))
	}
	return found
}

func TestLinksOfTheDocumentationLeadSomewhere(t *testing.T) {
	all := pages(t)
	places := make(map[string][]string)
	for _, p := range all {
		places[p.path] = p.anchors()
	}
	for _, p := range all {
		for _, link := range anchor.FindAllStringSubmatch(fence.ReplaceAllString(p.text, ""), -1) {
			if strings.Contains(link[1], "://") {
				continue
			}
			target, place, _ := strings.Cut(link[1], "#")
			path := p.path
			if target != "" {
				path = filepath.Join(filepath.Dir(p.path), target)
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s links to %s: %v", p.path, link[1], err)
			} else if place != "" && !slices.Contains(places[path], place) {
				t.Errorf("%s links to %s, and there is no such heading", p.path, link[1])
			}
		}
	}
}

// anchors are what links to the page's headings end in.
func (p page) anchors() []string {
	var all []string
	for _, h := range heading.FindAllStringSubmatch(fence.ReplaceAllString(p.text, ""), -1) {
		text := strings.ReplaceAll(strings.ToLower(strings.TrimSpace(h[1])), " ", "-")
		all = append(all, dropped.ReplaceAllString(text, ""))
	}
	return all
}

func TestDocumentedMakeTargetsExist(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pages(t) {
		for _, line := range slices.Concat(p.code, p.spans) {
			target := goal.FindStringSubmatch(line)
			if target != nil && !strings.Contains(string(makefile), "\n"+target[1]+":") {
				t.Errorf("%s: there is no %q", p.path, target[0])
			}
		}
	}
}

// programs are what the module builds: the help of each, and of each verb, such as "check" and
// "node release".
type programs map[string]map[string]string

func newPrograms(t *testing.T) programs {
	t.Helper()
	bin := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./cmd/...").CombinedOutput(); err != nil {
		t.Fatalf("build the commands: %v\n%s", err, out)
	}
	help := func(program string, args ...string) string {
		out, err := exec.CommandContext(t.Context(), filepath.Join(bin, program), append(args, "--help")...).CombinedOutput()
		if err != nil {
			t.Fatalf("help of %s %s: %v\n%s", program, args, err, out)
		}
		return string(out)
	}
	all := programs{}
	for _, program := range []string{"raceway", "raceway-agent", "raceway-ca"} {
		all[program] = map[string]string{"": help(program)}
	}
	var learn func(path ...string)
	learn = func(path ...string) {
		for _, verb := range verbsOf(all["raceway"][strings.Join(path, " ")]) {
			below := slices.Concat(path, []string{verb})
			all["raceway"][strings.Join(below, " ")] = help("raceway", below...)
			learn(below...)
		}
	}
	learn()
	return all
}

// verbsOf are the commands that a help lists.
func verbsOf(help string) []string {
	_, list, _ := strings.Cut(help, "Available Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	var verbs []string
	for line := range strings.Lines(list) {
		verbs = append(verbs, strings.Fields(line)[0])
	}
	return verbs
}

// foreignFlags are those of other programs that pages speak of by themselves.
func foreignFlags() []string {
	return []string{"register-with-taints" /* kubelet */, "force-conflicts" /* helm */, "set" /* helm */}
}

// wrong says what a command line names that does not exist; "" for lines of other programs.
func (all programs) wrong(line string) string {
	line = strings.TrimSpace(strings.TrimLeft(line, "#$ "))
	line, _, _ = strings.Cut(line, " | ")
	line, _, _ = strings.Cut(line, " #")
	words := strings.Fields(line)
	if len(words) == 0 {
		return ""
	}
	program := strings.TrimPrefix(words[0], "bin/")
	verbs := all[program]
	if verbs == nil {
		return ""
	}
	help, path := verbs[""], ""
	for _, word := range words[1:] {
		if strings.HasPrefix(word, "-") || len(verbsOf(help)) == 0 {
			break
		}
		word, _, _ = strings.Cut(word, "|") // workloads|services
		path = strings.TrimSpace(path + " " + word)
		if help = verbs[path]; help == "" {
			return fmt.Sprintf("there is no %s %s", program, path)
		}
	}
	for _, f := range flag.FindAllStringSubmatch(line, -1) {
		if !hasFlag(help, f[1]) {
			return fmt.Sprintf("there is no flag --%s in %q", f[1], line)
		}
	}
	return ""
}

func hasFlag(help, name string) bool {
	return regexp.MustCompile(`(?m)^ +(?:-\w, )?--` + name + `\b(?:[^-]|$)`).MatchString(help)
}

func (all programs) anyHasFlag(name string) bool {
	for _, verbs := range all {
		for _, help := range verbs {
			if hasFlag(help, name) {
				return true
			}
		}
	}
	return false
}

func TestDocumentedCommandsExist(t *testing.T) {
	all := newPrograms(t)
	if all.wrong("raceway nonsense") == "" || all.wrong("raceway-agent --nod x") == "" || all.wrong("raceway check --agent all") != "" ||
		all.wrong("raceway node relase") == "" || all.wrong("raceway node --force") == "" || all.wrong("raceway node release --force") != "" {
		t.Fatal("the test cannot tell what exists")
	}
	for _, p := range pages(t) {
		for _, line := range slices.Concat(p.code, p.spans) {
			if wrong := all.wrong(line); wrong != "" {
				t.Errorf("%s: %s", p.path, wrong)
			}
		}
		for _, s := range p.spans {
			if f := flag.FindStringSubmatch(s); strings.HasPrefix(s, "--") && !all.anyHasFlag(f[1]) && !slices.Contains(foreignFlags(), f[1]) {
				t.Errorf("%s: no program has a flag --%s", p.path, f[1])
			}
		}
	}
}

// setting is a value of a chart that a command line sets.
var setting = regexp.MustCompile(`--set(?:-string)?[ =]'?([A-Za-z][A-Za-z.]*)`)

// Values of the chart are named in backquotes, alone or with what they are set to, and by
// commands for the chart.
func TestDocumentedValuesExist(t *testing.T) {
	install, err := os.ReadFile("docs/install.md") // whose table is held to values.yaml
	if err != nil {
		t.Fatal(err)
	}
	known, groups := make(map[string]bool), make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Za-z.]+)` \\| `").FindAllSubmatch(install, -1) {
		name := string(m[1])
		known[name] = true
		if group, _, nested := strings.Cut(name, "."); nested {
			groups[group] = true
		}
	}
	others := []string{"cni.exclusive", "ca.crt", "cni.md", "cni.sock"} // Cilium's value, and files
	value := regexp.MustCompile(`^(([a-z]+)\.[A-Za-z.]+)(?:=.*)?$`)
	seen := 0
	for _, p := range pages(t) {
		check := func(name string) {
			seen++
			for part := name; !known[part]; { // what is given whole, as agent.resources, has no rows below it
				at := strings.LastIndex(part, ".")
				if at < 0 {
					t.Errorf("%s: the chart has no value %s", p.path, name)
					return
				}
				part = part[:at]
			}
		}
		for _, line := range p.code {
			if !strings.Contains(line, "daemonset/chart") {
				continue
			}
			for _, m := range setting.FindAllStringSubmatch(line, -1) {
				check(m[1])
			}
		}
		if p.path == "ARCHITECTURE.md" { // agent.pods is a name of Go there
			continue
		}
		for _, s := range p.spans {
			if m := value.FindStringSubmatch(s); m != nil && groups[m[2]] && !slices.Contains(others, m[1]) {
				check(m[1])
			}
		}
	}
	if len(known) < 40 || seen < 80 {
		t.Errorf("%d values, named %d times: the test no longer understands the pages", len(known), seen)
	}
}

// Metrics are described in docs/telemetry.md, which is held to the code.
func TestDocumentedMetricsExist(t *testing.T) {
	described, err := os.ReadFile("docs/telemetry.md")
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`^(?:increase\(|sum\()?((?:raceway|istio)_[a-z_]+[a-z])`)
	seen := 0
	for _, p := range pages(t) {
		for _, s := range slices.Concat(p.code, p.spans) {
			m := name.FindStringSubmatch(s)
			if m == nil || strings.HasSuffix(s, "_…") {
				continue
			}
			seen++
			if !strings.Contains(string(described), "\n| `"+m[1]+"` |") {
				t.Errorf("%s: there is no metric %s", p.path, m[1])
			}
		}
	}
	if seen < 30 {
		t.Errorf("%d metrics found: the test no longer understands the pages", seen)
	}
}

// Commands of kubectl name objects of the installation as the rendered manifest has them.
func TestDocumentedObjectsExist(t *testing.T) {
	manifest, err := os.ReadFile("daemonset/raceway.yaml")
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]string{"daemonset": "DaemonSet", "deploy": "Deployment", "deployment": "Deployment", "configmap": "ConfigMap"}
	others := []string{"raceway-ca-root"} // the CA makes it
	object := regexp.MustCompile(`\b(daemonset|deploy|deployment|configmap)[/ ](raceway[a-z-]*)(?:[^a-z.-]|$)`)
	seen := 0
	for _, p := range pages(t) {
		for _, line := range slices.Concat(p.code, p.spans) {
			if !strings.Contains(line, "kubectl") {
				continue
			}
			for _, m := range object.FindAllStringSubmatch(line, -1) {
				seen++
				there := regexp.MustCompile(`(?m)^kind: ` + kinds[m[1]] + `\nmetadata:\n  name: ` + m[2] + `$`)
				if !there.Match(manifest) && !slices.Contains(others, m[2]) {
					t.Errorf("%s: there is no %s %s: %s", p.path, m[1], m[2], line)
				}
			}
		}
	}
	if seen < 10 {
		t.Errorf("%d objects found: the test no longer understands the pages", seen)
	}
}
