package kube

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// wrote reports whether the file has that text.
func (r *rig) wrote(text string) bool {
	f, err := os.Open(r.config.SnapshotFile)
	if err != nil {
		return false
	}
	defer f.Close()
	unpacked, err := gzip.NewReader(f)
	if err != nil {
		return false
	}
	data, err := io.ReadAll(unpacked)
	return err == nil && strings.Contains(string(data), text)
}

func TestLastGoodSnapshotOutlivesARestart(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), withAnnotation(running("db", "node-2", "10.0.0.2"), true),
		authorization(t, "typo", `{"action": "DENY", "rule": [{}]}`))
	r.run()
	before := r.until("the capture", captured("db"))
	r.eventually("the file", func() bool { return r.wrote(`"captured":["uid-db"]`) })
	if info, err := os.Stat(r.config.SnapshotFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode = %v, %v", info.Mode(), err)
	}

	r.away(true)
	r.run()
	s := r.until("a snapshot without an API server", policies(1))
	if !captured("db")(s) || !workload(s, "web").Enrolled {
		t.Errorf("db captured = %v, web enrolled = %v", captured("db")(s), workload(s, "web").Enrolled)
	}
	if got, want := s.AuthorizationPolicies()[0], before.AuthorizationPolicies()[0]; got.Invalid != want.Invalid || got.Invalid == "" {
		t.Errorf("invalid = %q, want %q", got.Invalid, want.Invalid)
	}
	r.problem("is in force until the API server has told of all of it")

	// Part of the cluster is not enough to be up to date.
	r.answers("pods", forbidden("pods"))
	r.away(false)
	r.problem("no RBAC rule")
	r.problem("is in force until the API server has told of all of it")
	r.always("pods are those of the file", func() bool { return captured("db")(r.snapshot()) })
	r.deletePod("db")
	r.answers("pods", nil)
	r.until("the pod is gone", func(s *dataplane.Snapshot) bool { return workload(s, "db").UID == "" })
	// The policy that cannot be read as written stays a problem.
	r.eventually("no other problem", func() bool { return len(r.source.Problems()) == 1 })
}

// The file may be older than a capture, and its reader would speak to the pod in clear.
func TestFileStandsInForAnAPIServerOnlyWhenItHasTo(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), running("db", "node-2", "10.0.0.2"))
	r.run()
	r.until("a snapshot", func(s *dataplane.Snapshot) bool { return !s.Stale() })
	r.eventually("the file", func() bool { return r.wrote(`"captured":[]`) })

	r.pace.trust = time.Hour
	r.answers("pods", forbidden("pods")) // for long enough to see
	r.run()
	r.problem("no RBAC rule")
	r.always("the API server is waited for", func() bool { return r.snapshot() == nil })
	r.away(true)
	s := r.until("the file's snapshot", func(s *dataplane.Snapshot) bool { return s.Stale() })
	if workload(s, "db").UID == "" {
		t.Error("the file has no pods")
	}
	r.answers("pods", nil)
	r.away(false)
	r.until("the cluster of now", func(s *dataplane.Snapshot) bool { return !s.Stale() })

	r.stop()
	r.pace.trust = 10 * time.Millisecond
	r.answers("pods", forbidden("pods"))
	r.run()
	r.until("one that answers too little is not waited for in vain", func(s *dataplane.Snapshot) bool { return s.Stale() })
}

// A policy of which the file tells and the API server does not is gone; one whose API server
// only refuses to tell is not.
func TestPoliciesOfTheFile(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), authorization(t, "deny", `{"action": "DENY", "rules": [{}]}`))
	r.run()
	r.until("the policy", policies(1))
	r.eventually("the file", func() bool { return r.wrote(`"deny"`) })
	r.answers("authorizationpolicies", forbidden("authorizationpolicies"))
	r.run()
	r.problem("no RBAC rule")
	r.until("the policy of the file", policies(1))
	r.always("it stays", func() bool { return policies(1)(r.snapshot()) })
	r.uninstall()
	r.until("it goes with its kind", policies(0))
}

func TestFileThatCannotBeReadIsIgnored(t *testing.T) {
	good := exampleSnapshot(t)
	for name, data := range map[string][]byte{
		"empty": {}, "garbage": []byte("garbage"), "cut": good[:len(good)-9], "half": good[:len(good)/2],
		"another version": packed(t, `{"version": 2, "written": "2026-11-21T00:00:00Z", "captured": [], "objects": 0}`),
		"no time":         packed(t, `{"version": 1, "captured": [], "objects": 0}`),
		"an object short": packed(t, `{"version": 1, "written": "2026-11-21T00:00:00Z", "captured": [], "objects": 1}`),
		"no object":       packed(t, `{"version": 1, "written": "2026-11-21T00:00:00Z", "captured": [], "objects": 1}`, `{"kind": "Pod"}`),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shop())
			if err := os.WriteFile(r.config.SnapshotFile, data, 0o600); err != nil {
				t.Fatal(err)
			}
			r.away(true)
			r.run()
			if !strings.Contains(r.log.String(), "the last good snapshot cannot be used") {
				t.Errorf("nothing is said:\n%s", r.log)
			}
			r.problem("away since")
			r.always("nothing is published", func() bool { return r.snapshot() == nil })
			r.away(false)
			r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
			r.eventually("a file that can be read", func() bool { return r.wrote(`"shop"`) })
		})
	}
}

func packed(t testing.TB, lines ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := io.WriteString(w, strings.Join(lines, "\n")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func exampleSnapshot(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	err := encodeSnapshot(&b, header{Version: snapshotVersion, Written: time.Unix(1, 0), Captured: []string{"u"}, Objects: 3}, []any{
		convert("Pod", running("web", "node-1", "10.0.0.1")).object,
		convert("Namespace", shop()).object,
		json.RawMessage(`{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"p","namespace":"shop"},"spec":{}}`),
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Whatever a file holds, it is read as a whole or not at all, and what was read reads the
// same when it is written again.
func FuzzSnapshotFile(f *testing.F) {
	unpack := func(data []byte) string {
		r, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			f.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			f.Fatal(err)
		}
		return string(text)
	}
	f.Add(unpack(exampleSnapshot(f)))
	f.Add(`{"version":1,"written":"2026-11-21T00:00:00Z","objects":1}{"apiVersion":"v1","kind":"Service","metadata":{"name":"s"},"spec":{"ports":[{"port":80,"targetPort":"x"}]}}`)
	f.Add(`{"version":1,"written":"2026-11-21T00:00:00Z","objects":1}{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"s"},"ports":[{"port":1}],"endpoints":[{"addresses":["::1"]}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		head, items, err := readSnapshot(bytes.NewReader(packed(t, text)), 1<<20)
		if err != nil {
			return
		}
		objects := make([]any, 0, len(items))
		for _, it := range items {
			if it.policy != nil {
				objects = append(objects, it.policy.raw)
			} else {
				objects = append(objects, it.object)
			}
		}
		var b bytes.Buffer
		if err := encodeSnapshot(&b, head, objects); err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		_, again, err := readSnapshot(&b, 1<<20)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		for i := range again {
			if again[i].key != items[i].key || again[i].uid != items[i].uid {
				t.Fatalf("%v %q became %v %q", items[i].key, items[i].uid, again[i].key, again[i].uid)
			}
			a, _ := items[i].object.Workload()
			b, _ := again[i].object.Workload()
			if !maps.Equal(a.Labels, b.Labels) || !slices.Equal(a.Addrs, b.Addrs) || a.Owner != b.Owner {
				t.Fatalf("%+v became %+v", a, b)
			}
		}
	})
}
