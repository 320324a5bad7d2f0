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
	fence  = regexp.MustCompile("(?ms)^```[a-z]*\n(.*?)^```")
	span   = regexp.MustCompile("`([^`\n]+)`")
	anchor = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	goal   = regexp.MustCompile(`^(?:#|\$)?\s*make ([a-z0-9-]+)`)
	flag   = regexp.MustCompile(`(?:^|\s)--([a-z][a-z0-9-]*)`)
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
	for _, p := range pages(t) {
		for _, link := range anchor.FindAllStringSubmatch(fence.ReplaceAllString(p.text, ""), -1) {
			target, _, _ := strings.Cut(link[1], "#")
			if target == "" || strings.Contains(target, "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(p.path), target)); err != nil {
				t.Errorf("%s links to %s: %v", p.path, link[1], err)
			}
		}
	}
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

// programs are what the module builds: the help of each, and of each verb.
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
	for _, verb := range verbsOf(all["raceway"][""]) {
		text := help("raceway", verb)
		for _, below := range verbsOf(text) {
			text += help("raceway", verb, below)
		}
		all["raceway"][verb] = text
	}
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
	return []string{"register-with-taints" /* kubelet */, "force-conflicts" /* helm */}
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
	help := verbs[""]
	if program == "raceway" && len(words) > 1 && !strings.HasPrefix(words[1], "-") {
		verb, _, _ := strings.Cut(words[1], "|") // workloads|services
		if verbs[verb] == "" {
			return fmt.Sprintf("there is no %s %s", program, verb)
		}
		help = verbs[verb]
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
	if all.wrong("raceway nonsense") == "" || all.wrong("raceway-agent --nod x") == "" || all.wrong("raceway check --agent all") != "" {
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
