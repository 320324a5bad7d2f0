package docs

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestGuardsCountersAreThoseOfThePage(t *testing.T) {
	source, err := os.ReadFile("../bpf/include/maps.h")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, match := range regexp.MustCompile(`\bGUARD_(DROPPED_[A-Z_]+),`).FindAllSubmatch(source, -1) {
		want = append(want, strings.ToLower(string(match[1])))
	}
	var got []string
	for _, row := range table(t, "security.md", "guard") {
		got = append(got, words(row[0])...)
	}
	slices.Sort(want)
	slices.Sort(got)
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("the page has %q, the guard %q", got, want)
	}
}

// The pages name flags of the agent and the CA only that these have.
func TestFlagsOfThePagesExist(t *testing.T) {
	var defined strings.Builder
	for _, name := range []string{"../cmd/raceway-agent/main.go", "../cmd/raceway-ca/main.go", "../cmd/raceway-ca/files.go", "../cmd/raceway-ca/kubernetes.go", "../cmd/raceway/root.go", "../cmd/raceway/flows.go"} {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		defined.Write(source)
	}
	flag := regexp.MustCompile("`--([a-z-]+)`")
	seen := 0
	for _, name := range []string{"security.md", "policy.md", "telemetry.md", "operations.md"} {
		for _, match := range flag.FindAllStringSubmatch(strings.Join(page(t, name), "\n"), -1) {
			seen++
			if !strings.Contains(defined.String(), `"`+match[1]+`"`) {
				t.Errorf("%s names --%s, which no command has", name, match[1])
			}
		}
	}
	if seen < 5 {
		t.Errorf("%d flags found: the test no longer understands the pages", seen)
	}
}
