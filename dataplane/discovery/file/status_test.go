package file

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestStatusFile(t *testing.T) {
	cases := []struct {
		name, text string
		line       int // 0: good
		want       string
	}{
		{"good", `{"node": "n1", "captured": ["a"], "updated": "2026-11-02T10:00:00Z"}`, 0, "a"},
		{"nothing captured", `{"node": "n1", "captured": []}`, 0, ""},
		{"fields of a later version", `{"node": "n1", "captured": ["a"], "draining": []}`, 0, "a"},
		{"another node's", `{"node": "n2", "captured": ["a"]}`, 1, `node "n2" in the file of node "n1"`},
		{"no node", `{}`, 1, `node ""`},
		{"empty", "", 1, "EOF"},
		{"cut off", "{\"node\": \"n1\",\n\"captured\": [\"a\"", 2, "unexpected EOF"},
		{"syntax", "{\n\"node\": n1}", 2, "invalid character"},
		{"another type", "{\"node\": \"n1\",\n\n\"captured\": 7}", 3, "captured"},
		{"something after it", "{\"node\": \"n1\"}\n{}", 2, "something follows"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s, faults := parseStatus("n1.json", []byte(c.text))
			if c.line == 0 {
				if len(faults) > 0 || strings.Join(s.Captured, " ") != c.want {
					t.Errorf("status = %+v, faults = %+v", s, faults)
				}
				return
			}
			if len(faults) != 1 || faults[0].line != c.line || !strings.Contains(faults[0].cause, c.want) {
				t.Errorf("faults = %+v, want line %d: %s", faults, c.line, c.want)
			}
		})
	}
}

func FuzzStatus(f *testing.F) {
	for _, seed := range []string{
		`{"node":"n1","captured":["a"],"updated":"2026-11-02T10:00:00Z"}`, `{"node":"n1"} x`, `[`, `{"captured":[1]}`, `null`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, faults := parseStatus("n1.json", data)
		if len(faults) == 0 && s.Node != "n1" {
			t.Fatalf("took %+v for the status of n1", s)
		}
		for _, p := range faults {
			if p.line < 1 || p.line > bytes.Count(data, []byte("\n"))+1 || p.cause == "" || strings.Contains(p.cause, "\n") {
				t.Fatalf("fault %+v", p)
			}
		}
	})
}

func TestPublisherWritesTheFileOfItsNode(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "status")
	p, err := NewPublisher(dir, "n1")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.PublishCaptured(t.Context(), []string{"b", "a", "b"}, nil); err != nil {
		t.Fatal(err)
	}
	s, faults := readStatus(t, filepath.Join(dir, "n1.json"))
	if len(faults) > 0 || !slices.Equal(s.Captured, []string{"a", "b"}) || s.Updated.IsZero() {
		t.Errorf("status = %+v, faults = %v", s, faults)
	}
	if err := p.PublishCaptured(t.Context(), nil, nil); err != nil {
		t.Fatal(err)
	}
	if s, _ = readStatus(t, filepath.Join(dir, "n1.json")); s.Captured == nil || len(s.Captured) > 0 {
		t.Errorf("captured = %#v, want an empty list", s.Captured)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%d files, %v: temporary files are left", len(entries), err)
	}
	for _, node := range []string{"", "../n1", "a/b", "."} {
		if _, err := NewPublisher(dir, node); err == nil {
			t.Errorf("took node %q", node)
		}
	}
}

func TestPublisherSaysWhatFailed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "status")
	p, err := NewPublisher(dir, "n1")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "n1.json"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := p.PublishCaptured(t.Context(), nil, nil); err == nil || !strings.Contains(err.Error(), "publish captured pods") {
		t.Errorf("error = %v", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := p.PublishCaptured(t.Context(), nil, nil); err == nil {
		t.Error("published into nothing")
	}
}

// Readers of the file see one publication or another, never a part of one.
func TestPublicationIsAtomic(t *testing.T) {
	dir := t.TempDir()
	p, err := NewPublisher(dir, "n1")
	if err != nil {
		t.Fatal(err)
	}
	var long []string
	for i := range 5000 {
		long = append(long, fmt.Sprintf("uid-%05d", i))
	}
	if err := p.PublishCaptured(t.Context(), long, nil); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		defer close(done)
		for i := range 50 {
			if err := p.PublishCaptured(t.Context(), long[:(i%2)*len(long)], nil); err != nil {
				t.Error(err)
			}
		}
	})
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		s, faults := readStatus(t, filepath.Join(dir, "n1.json"))
		if len(faults) > 0 || len(s.Captured) != 0 && len(s.Captured) != len(long) {
			t.Errorf("read %d pods, faults %v", len(s.Captured), faults)
			break
		}
	}
	writer.Wait()
}

func readStatus(t *testing.T, path string) (status, []fault) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parseStatus(filepath.Base(path), data)
}
