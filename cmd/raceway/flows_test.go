package main

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

// lines hands over each line as it is written.
type lines struct {
	mu      sync.Mutex
	pending bytes.Buffer
	out     chan string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending.Write(p)
	for {
		line, err := l.pending.ReadString('\n')
		if err != nil {
			l.pending.WriteString(line)
			return len(p), nil
		}
		l.out <- line
	}
}

// following runs a command line until cancel; its output comes line by line.
func following(t *testing.T, dir string, args ...string) (out <-chan string, cancel func() (code int, stderr string)) {
	t.Helper()
	term := newTerminal(dir)
	l := &lines{out: make(chan string, 100)}
	term.out = l
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int)
	go func() { ended <- term.run(ctx, args) }()
	return l.out, func() (int, string) {
		stop()
		return <-ended, term.stderr.String()
	}
}

func next(t *testing.T, out <-chan string) string {
	t.Helper()
	select {
	case line := <-out:
		return line
	case <-time.After(10 * time.Second):
		t.Fatal("no line came")
		return ""
	}
}

func TestFollowPrintsEachFlowAsItComesUntilInterrupted(t *testing.T) {
	live := make(chan admin.Flow)
	backend := nodeOne()
	backend.Recent, backend.Live = flowRows()[:1], live
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", backend)
	out, cancel := following(t, dir, "flows", "-f")
	if line := next(t, out); !strings.HasPrefix(line, "TIME") {
		t.Errorf("first line %q, want the header", line)
	}
	if line := next(t, out); !strings.Contains(line, "open") || !strings.HasPrefix(line, "11:58:30.000") {
		t.Errorf("second line %q, want the recent flow", line)
	}
	for _, f := range flowRows()[1:] {
		live <- f
		if line := next(t, out); !strings.Contains(line, string(f.Event)) {
			t.Errorf("line %q, want %s", line, f.Event)
		}
	}
	if code, stderr := cancel(); code != exitOK || stderr != "" {
		t.Errorf("after an interrupt: exit code %d, %q", code, stderr)
	}
}

func TestFollowFiltersByNamespaceAndWritesLinesOfJSON(t *testing.T) {
	live := make(chan admin.Flow)
	backend := &admintest.Backend{Live: live}
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", backend)
	out, cancel := following(t, dir, "flows", "-f", "-o", "json", "-n", "legacy")
	for _, f := range flowRows() {
		live <- f
	}
	var got admin.Flow
	if err := json.Unmarshal([]byte(next(t, out)), &got); err != nil || got.Event != admin.FlowDenied {
		t.Errorf("got %+v, %v, want the denied flow alone", got, err)
	}
	if code, stderr := cancel(); code != exitOK {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	if len(out) > 0 {
		t.Errorf("another line came: %s", <-out)
	}
}

func TestFollowGoesOnWithTheOthersWhenOneAgentEnds(t *testing.T) {
	first, second := make(chan admin.Flow), make(chan admin.Flow)
	dir := t.TempDir()
	stopFirst := admintest.Serve(t, dir, "n1", &admintest.Backend{Live: first})
	admintest.Serve(t, dir, "n2", &admintest.Backend{Live: second})
	out, cancel := following(t, dir, "flows", "-f", "--agent", "all", "--no-headers")
	first <- flowRows()[0]
	if line := next(t, out); !strings.HasPrefix(line, "n1 ") {
		t.Errorf("line %q, want one of n1", line)
	}
	stopFirst()
	second <- flowRows()[0]
	if line := next(t, out); !strings.HasPrefix(line, "n2 ") {
		t.Errorf("line %q, want one of n2", line)
	}
	if code, stderr := cancel(); code != exitAgent || !strings.Contains(stderr, "agent n1: the agent ended the stream") {
		t.Errorf("exit code %d, %q, want the end of n1's stream", code, stderr)
	}
}
