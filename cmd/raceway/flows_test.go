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

// follower is a command line that runs until it is interrupted; what it writes comes line
// by line.
type follower struct {
	out, err  <-chan string
	interrupt func() (code int)
}

func following(t *testing.T, dir string, args ...string) follower {
	t.Helper()
	term := newTerminal(dir)
	out, errOut := &lines{out: make(chan string, 100)}, &lines{out: make(chan string, 100)}
	term.out, term.errOut = out, errOut
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int)
	go func() { ended <- term.run(ctx, args) }()
	return follower{out.out, errOut.out, func() int {
		stop()
		return <-ended
	}}
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
	f := following(t, dir, "flows", "-f")
	if line := next(t, f.out); !strings.HasPrefix(line, "TIME") {
		t.Errorf("first line %q, want the header", line)
	}
	if line := next(t, f.out); !strings.Contains(line, "open") || !strings.HasPrefix(line, "11:58:30.000") {
		t.Errorf("second line %q, want the recent flow", line)
	}
	for _, flow := range flowRows()[1:] {
		live <- flow
		if line := next(t, f.out); !strings.Contains(line, string(flow.Event)) {
			t.Errorf("line %q, want %s", line, flow.Event)
		}
	}
	if code := f.interrupt(); code != exitOK || len(f.err) > 0 {
		t.Errorf("after an interrupt: exit code %d and %d errors", code, len(f.err))
	}
}

func TestFollowFiltersByNamespaceAndWritesLinesOfJSON(t *testing.T) {
	live := make(chan admin.Flow)
	backend := &admintest.Backend{Live: live}
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", backend)
	f := following(t, dir, "flows", "-f", "-o", "json", "-n", "legacy")
	for _, flow := range flowRows() {
		live <- flow
	}
	var got admin.Flow
	if err := json.Unmarshal([]byte(next(t, f.out)), &got); err != nil || got.Event != admin.FlowDenied {
		t.Errorf("got %+v, %v, want the denied flow alone", got, err)
	}
	if code := f.interrupt(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if len(f.out) > 0 {
		t.Errorf("another line came: %s", <-f.out)
	}
}

func TestFollowGoesOnWithTheOthersWhenOneAgentEnds(t *testing.T) {
	first, second := make(chan admin.Flow), make(chan admin.Flow)
	dir := t.TempDir()
	stopFirst := admintest.Serve(t, dir, "n1", &admintest.Backend{Live: first})
	admintest.Serve(t, dir, "n2", &admintest.Backend{Live: second})
	f := following(t, dir, "flows", "-f", "--agent", "all", "--no-headers")
	first <- flowRows()[0]
	if line := next(t, f.out); !strings.HasPrefix(line, "n1 ") {
		t.Errorf("line %q, want one of n1", line)
	}
	stopFirst()
	if line := next(t, f.err); !strings.Contains(line, "agent n1: the agent ended the stream") {
		t.Errorf("the end of n1's stream is told as %q", line)
	}
	second <- flowRows()[0]
	if line := next(t, f.out); !strings.HasPrefix(line, "n2 ") {
		t.Errorf("line %q, want one of n2", line)
	}
	if code := f.interrupt(); code != exitAgent {
		t.Errorf("exit code %d, want %d", code, exitAgent)
	}
	if line := next(t, f.err); !strings.Contains(line, "1 of 2 agents ended") {
		t.Errorf("at the end it says %q", line)
	}
}
