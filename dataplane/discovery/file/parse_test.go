package file

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// found says what a manifest holds: each object's line and key.
func found(m manifest) []string {
	var out []string
	for _, o := range m.objects {
		out = append(out, fmt.Sprintf("%d %s", o.line, o.Key))
	}
	return out
}

func TestManifestForms(t *testing.T) {
	const ns = "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n"
	a, b := fmt.Sprintf(ns, "a"), fmt.Sprintf(ns, "b")
	cases := []struct {
		name, text string
		want       []string
	}{
		{"nothing", "", nil},
		{"comments alone", "# one\n\n--- # two\n# three\n", nil},
		{"null", "---\nnull\n---\n~\n", nil},
		{"one document", a, []string{"1 Namespace a"}},
		{"two documents", a + "---\n" + b, []string{"1 Namespace a", "5 Namespace b"}},
		{"markers before, between and after", "---\n---\n# c\n" + a + "---\n\n---\n" + b + "---\n", []string{"4 Namespace a", "10 Namespace b"}},
		{"end marker", a + "...\n" + b, []string{"1 Namespace a", "5 Namespace b"}},
		{"directive", "%YAML 1.1\n---\n" + a, []string{"3 Namespace a"}},
		{"document on the marker's line", "--- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n", []string{"1 Namespace a"}},
		{"Windows line ends", strings.ReplaceAll(a+"---\n"+b, "\n", "\r\n"), []string{"1 Namespace a", "5 Namespace b"}},
		{"byte order mark", "\xef\xbb\xbf" + a, []string{"1 Namespace a"}},
		{"no line end", strings.TrimSuffix(a, "\n"), []string{"1 Namespace a"}},
		{"dashes within a text", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nspec:\n  text: |\n    ---\n    x\n", []string{"1 Namespace a"}},
		{"JSON", `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}`, []string{"1 Namespace a"}},
		{"JSON with tabs", "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Namespace\",\n\t\"metadata\": {\"name\": \"a\"}\n}\n", []string{"1 Namespace a"}},
		{"JSON with escapes", `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "annotations": {"x": "\/ \ud83d\ude00"}}}`, []string{"1 Namespace a"}},
		{"other kinds", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n---\n" + a, []string{"5 Namespace a"}},
		{
			"list with its items' lines", "apiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata:\n    name: a\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: b}\nkind: List\n",
			[]string{"3 Namespace a", "7 Namespace b"},
		},
		{
			"list in another form", "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Namespace, metadata: {name: a}}]\n",
			[]string{"1 Namespace a"},
		},
		{"empty list", "apiVersion: v1\nkind: List\nitems: []\n", nil},
		{"list without items", "apiVersion: v1\nkind: List\n", nil},
		{
			"typed list, whose items need not say what they are", "apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: a}\n",
			[]string{"4 Namespace a"},
		},
		{"typed list of what is not read", "apiVersion: apps/v1\nkind: DeploymentList\nitems:\n- metadata: {name: a}\n", nil},
		{"a kind that only sounds like a list", "apiVersion: x.example.org/v1\nkind: AllowList\nmetadata: {name: a}\n", nil},
		{
			"list of lists", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: List\n  items:\n  - {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n",
			[]string{"4 Namespace a"},
		},
		{
			"anchors", "apiVersion: v1\nkind: Namespace\nmetadata: &m {name: a}\nspec: {x: *m}\n",
			[]string{"1 Namespace a"},
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m, faults := parseManifest("f.yaml", []byte(c.text))
			if len(faults) > 0 {
				t.Fatalf("faults: %+v", faults)
			}
			if got := found(m); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestManifestFaultsSayLineAndCause(t *testing.T) {
	const good = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n"
	nested := `{apiVersion: v1, kind: Namespace, metadata: {name: a}}`
	for range maxListDepth + 1 {
		nested = `{apiVersion: v1, kind: List, items: [` + nested + `]}`
	}
	bomb := "a: &a [x, x, x, x, x, x, x, x, x]\n"
	for i := range 9 {
		bomb += fmt.Sprintf("%c: &%c [%s]\n", 'b'+i, 'b'+i, strings.Repeat(fmt.Sprintf("*%c, ", 'a'+i), 9))
	}
	cases := []struct {
		name, text string
		line       int
		want       string
	}{
		{"YAML syntax", good + "apiVersion: v1\nkind: [Namespace\nmetadata: {name: b}\n", 6, "not valid YAML"},
		{"tab", good + "apiVersion: v1\nkind: Namespace\nmetadata:\n\tname: b\n", 8, "not valid YAML"},
		{"a key twice", good + "apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\nkind: Pod\n", 8, `"kind" already set`},
		{"a JSON key twice", "{\"kind\": \"Pod\",\n\"kind\": \"Namespace\"}", 2, `"kind" already set`},
		{"a JSON key twice where YAML would not do", `{"kind": "\/", "kind": "Namespace"}`, 1, "not valid YAML"},
		{"aliases without end", bomb, 1, "excessive aliasing"},
		{"nesting without end", strings.Repeat("[", 20000), 1, "not valid YAML"},
		{"unknown alias", "a: *b\n", 1, "unknown anchor"},
		{"text", good + "\n\nhello\n", 7, "not a Kubernetes object"},
		{"a list that is none", "- a\n- b\n", 1, "not a Kubernetes object"},
		{"no kind", good + "apiVersion: v1\nmetadata: {name: b}\n", 5, "it has no kind"},
		{"no apiVersion", "kind: Namespace\nmetadata: {name: b}\n", 1, "Namespace: it has no apiVersion"},
		{"bad object", good + "# c\napiVersion: v1\nkind: Pod\nmetadata: {name: b, namespace: shop}\nstatus: {podIP: x}\n", 6, `Pod shop/b: status.podIPs: "x" is not an IP address`},
		{
			"bad item", "apiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: B}\nkind: List\n",
			6, "items[1]: Pod B: metadata.name",
		},
		{"item without a kind", "apiVersion: v1\nkind: List\nitems:\n- metadata: {name: a}\n", 4, "items[0]: not a Kubernetes object: it has no kind"},
		{"lists nested too deep", nested, 1, "nested deeper than 4"},
		{"items of another type", "apiVersion: v1\nkind: List\nitems: {a: b}\n", 1, "not a Kubernetes object"},
		{"binary", "\x00\x01\x02", 1, "not valid YAML"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, faults := parseManifest("f.yaml", []byte(c.text))
			if len(faults) == 0 {
				t.Fatal("no fault")
			}
			if f := faults[0]; f.line != c.line || !strings.Contains(f.cause, c.want) {
				t.Errorf("fault = %d: %s; want %d: %s", f.line, f.cause, c.line, c.want)
			}
		})
	}
}

func TestFaultsOfAFileAreBounded(t *testing.T) {
	_, faults := parseManifest("f.yaml", []byte(strings.Repeat("kind: x\n---\n", 1000)))
	if len(faults) != maxFaults {
		t.Errorf("%d faults, want %d", len(faults), maxFaults)
	}
	list := "apiVersion: v1\nkind: List\nitems:\n" + strings.Repeat("- kind: x\n", 1000)
	if _, faults = parseManifest("f.yaml", []byte(list)); len(faults) != maxFaults {
		t.Errorf("%d faults of a list, want %d", len(faults), maxFaults)
	}
}

func TestIgnoredKindsAreKnown(t *testing.T) {
	m, faults := parseManifest("f.yaml", []byte("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n"))
	if len(faults) > 0 || !slices.Equal(m.ignored, []string{"apps/v1 Deployment"}) {
		t.Errorf("ignored = %v, faults = %v", m.ignored, faults)
	}
}

func FuzzParse(f *testing.F) {
	seeds, err := filepath.Glob("testdata/cluster/*.*")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, path := range seeds {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, s := range []string{
		"---", "...\n---\n", "--- a", "%YAML 1.2\n---\n{}", "a: &a [*a]", "kind: List\napiVersion: v1\nitems: [null]",
		"{\"kind\":\"Pod\",\"apiVersion\":\"v1\",\"metadata\":{\"name\":\"\\ud83d\\ude00\"}}", "\xff\xfea\x00", "? a\n: b", "!!binary x",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, faults := parseManifest("f.yaml", data)
		lines := bytes.Count(data, []byte("\n")) + 1
		for _, p := range faults {
			if p.line < 1 || p.line > lines || p.cause == "" || strings.ContainsAny(p.cause, "\n\r") {
				t.Fatalf("fault %+v in %d lines", p, lines)
			}
		}
		for _, o := range m.objects {
			if o.line < 1 || o.line > lines || o.Key.Name.Name == "" {
				t.Fatalf("object %+v in %d lines", o.Key, lines)
			}
		}
	})
}
