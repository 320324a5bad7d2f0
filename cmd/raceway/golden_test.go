package main

import (
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/cmd/internal/version"
)

// goldenCase is a command line whose output is kept in testdata/name.
type goldenCase struct {
	name string
	line string
	two  bool // two agents on this machine
	code int
}

func goldenCases() []goldenCase {
	var cases []goldenCase
	for _, verb := range []string{"workloads", "services", "policies", "certificates", "connections", "flows", "check", "log-level"} {
		code := exitOK
		if verb == "check" {
			code = exitFound
		}
		for _, form := range formatNames() {
			cases = append(cases, goldenCase{verb + "." + form, verb + " -o " + form, false, code})
		}
		cases = append(cases,
			goldenCase{verb + ".all", verb + " --agent all", true, code},
			goldenCase{verb + ".all.json", verb + " --agent all -o json", true, code},
			goldenCase{verb + ".namespace", verb + " -n legacy", false, map[bool]int{true: exitOK, false: code}[verb == "check"]},
			goldenCase{verb + ".no-headers", verb + " --no-headers", false, code},
		)
	}
	return append(cases,
		goldenCase{"why.table", "why web db:3306", false, exitOK},
		goldenCase{"why.wide", "why web db:3306 -o wide", false, exitOK},
		goldenCase{"why.no-headers", "why web db:3306 --no-headers", false, exitOK},
		goldenCase{"why.json", "why web db:3306 -o json", false, exitOK},
		goldenCase{"why.yaml", "why web db:3306 -o yaml", false, exitOK},
		goldenCase{"why.denied", "why old db.shop:3306", false, exitOK},
		goldenCase{"check.ok", "check --agent n2", true, exitOK},
		goldenCase{"help", "-h", false, exitOK},
		goldenCase{"help.why", "why -h", false, exitOK},
	)
}

func TestOutput(t *testing.T) {
	one, two := oneNode(t), twoNodes(t)
	for _, test := range goldenCases() {
		t.Run(test.name, func(t *testing.T) {
			dir := one
			if test.two {
				dir = two
			}
			code, stdout, stderr := raceway(t, dir, strings.Fields(test.line)...)
			if code != test.code {
				t.Errorf("exit code %d, want %d: %s", code, test.code, stderr)
			}
			golden(t, test.name, stdout)
		})
	}
}

func TestVersionNamesThisProgramAndTheAgents(t *testing.T) {
	code, stdout, stderr := raceway(t, twoNodes(t), "version", "--no-headers")
	if code != exitOK {
		t.Fatal(stderr)
	}
	lines := strings.Split(stdout, "\n")
	for i, want := range []string{"raceway " + version.String(), "raceway-agent v0.1.0 n1 6.18.0 sk_lookup", "raceway-agent v0.1.0 n2 6.18.0 tc"} {
		if got := strings.Join(strings.Fields(lines[i]), " "); got != want {
			t.Errorf("line %d is %q, want %q", i, got, want)
		}
	}
	code, stdout, _ = raceway(t, t.TempDir(), "version", "--client", "-o", "yaml")
	if code != exitOK || !strings.Contains(stdout, "component: raceway\n") {
		t.Errorf("version --client = %d %s", code, stdout)
	}
	code, stdout, stderr = raceway(t, t.TempDir(), "version")
	if code != exitAgent || !strings.Contains(stdout, "raceway") || !strings.Contains(stderr, "is raceway-agent running") {
		t.Errorf("version without an agent = %d %q %q", code, stdout, stderr)
	}
}

func TestEmptyListIsATableOfItsHeaderAndAnEmptyArray(t *testing.T) {
	dir := oneNode(t)
	code, stdout, _ := raceway(t, dir, "services", "-n", "nowhere")
	if code != exitOK || strings.Join(strings.Fields(stdout), " ") != "NAMESPACE NAME ADDRESS PORTS READY CAPTURED" {
		t.Errorf("table = %d %q", code, stdout)
	}
	for _, verb := range []string{"workloads", "services", "policies", "certificates", "connections", "check"} {
		_, stdout, _ := raceway(t, dir, verb, "-n", "nowhere", "-o", "json")
		if verb != "check" && stdout != "[]\n" {
			t.Errorf("%s -o json = %q, want []", verb, stdout)
		}
	}
}

func TestYAMLSaysWhatJSONSays(t *testing.T) {
	dir := oneNode(t)
	for _, verb := range []string{"workloads", "services", "policies", "certificates", "connections"} {
		_, asJSON, _ := raceway(t, dir, verb, "-o", "json")
		_, asYAML, _ := raceway(t, dir, verb, "-o", "yaml")
		fromJSON, err := yaml.JSONToYAML([]byte(asJSON))
		if err != nil {
			t.Fatal(err)
		}
		if string(fromJSON) != asYAML {
			t.Errorf("%s differs:\n%s\n%s", verb, asJSON, asYAML)
		}
	}
}

func TestColoursDoNotMoveColumns(t *testing.T) {
	dir := oneNode(t)
	_, want, _ := raceway(t, dir, "workloads")
	term := newTerminal(dir)
	term.color = true
	if code := term.run(t.Context(), []string{"workloads"}); code != exitOK {
		t.Fatal(term.stderr.String())
	}
	got := term.stdout.String()
	if !strings.Contains(got, "\x1b[31mfailed\x1b[0m") || !strings.Contains(got, "\x1b[32mcaptured\x1b[0m") {
		t.Errorf("states have no colours: %q", got)
	}
	for _, code := range []string{toneGood.escape(), toneBad.escape(), toneWarn.escape(), escapeReset} {
		got = strings.ReplaceAll(got, code, "")
	}
	if got != want {
		t.Errorf("without its colours it is\n%s\nwant\n%s", got, want)
	}
}

func TestTextOfOthersCannotTalkToTheTerminal(t *testing.T) {
	if got := oneLine("a\x1b[31mb\nc\td\u009b1me\x7f é"); got != "a[31mb c d1me é" {
		t.Errorf("oneLine = %q", got)
	}
}
