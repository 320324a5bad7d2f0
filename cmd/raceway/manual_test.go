package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const cliDoc = "../../docs/cli.md"

// example is a marker and the block after it.
var example = regexp.MustCompile("(?s)<!-- golden: ([^ ]+) -->\n```console\n.*?```")

// TestDocumentationShowsRealOutput keeps the examples of docs/cli.md equal to the golden
// files, which are what the program prints.
func TestDocumentationShowsRealOutput(t *testing.T) {
	doc, err := os.ReadFile(cliDoc)
	if err != nil {
		t.Fatal(err)
	}
	lines := make(map[string]string)
	for _, c := range goldenCases() {
		lines[c.name] = strings.TrimSuffix(c.line, " -o table")
	}
	shown := 0
	want := example.ReplaceAllStringFunc(string(doc), func(block string) string {
		name := example.FindStringSubmatch(block)[1]
		line, ok := lines[name]
		if !ok {
			t.Errorf("%s shows %s, which no test produces", cliDoc, name)
			return block
		}
		output, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Error(err)
			return block
		}
		shown++
		return "<!-- golden: " + name + " -->\n```console\n# raceway " + line + "\n" + string(output) + "```"
	})
	verbs := slices.DeleteFunc(newRoot(newTerminal("").cli).Commands(), func(verb *cobra.Command) bool {
		// version prints its own build, and the others need a cluster
		return verb.Hidden || slices.Contains([]string{"version", "uninstall", "bug-report", "node"}, verb.Name())
	})
	if shown < len(verbs) {
		t.Errorf("%s shows %d examples, fewer than there are verbs", cliDoc, shown)
	}
	if want == string(doc) {
		return
	}
	if !*update {
		t.Errorf("%s differs from what the program prints: go test ./cmd/raceway -update rewrites it", cliDoc)
		return
	}
	if err := os.WriteFile(cliDoc, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestEveryVerbAndFlagIsDocumented(t *testing.T) {
	doc, err := os.ReadFile(cliDoc)
	if err != nil {
		t.Fatal(err)
	}
	mentioned := func(what string) {
		t.Helper()
		if !strings.Contains(string(doc), what) {
			t.Errorf("%s does not mention %s", cliDoc, what)
		}
	}
	root := newRoot(newTerminal("").cli)
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) { mentioned("`--" + f.Name) })
	for _, verb := range root.Commands() {
		if verb.Hidden {
			continue
		}
		mentioned("## " + verb.Name())
		for _, v := range append(verb.Commands(), verb) {
			if v.Hidden {
				continue
			}
			v.Flags().VisitAll(func(f *pflag.Flag) { mentioned("`--" + f.Name) })
			checkHelp(t, v)
		}
	}
}

// checkHelp keeps -h useful.
func checkHelp(t *testing.T, verb *cobra.Command) {
	t.Helper()
	if verb.Short == "" || verb.Long == "" || !strings.Contains(verb.Example, "  "+verb.CommandPath()) {
		t.Errorf("the help of %s lacks a text or an example of it", verb.Name())
	}
	for line := range strings.Lines(verb.Long) {
		if len([]rune(line)) > 100 {
			t.Errorf("the help of %s has a line of over 100 characters: %s", verb.Name(), line)
		}
	}
}
