package admin_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

func flow(event admin.FlowEvent) admin.Flow {
	return admin.Flow{Time: noon, Event: event, Connection: connection()}
}

func TestFlowsWithoutFollowEndAfterTheRecentOnes(t *testing.T) {
	c := start(t, &admintest.Backend{Recent: []admin.Flow{flow(admin.FlowOpen), flow(admin.FlowClose)}})
	var events []admin.FlowEvent
	err := c.Flows(t.Context(), false, func(f admin.Flow) error {
		if f.Connection != connection() {
			t.Errorf("got connection %+v", f.Connection)
		}
		events = append(events, f.Event)
		return nil
	})
	if err != nil || fmt.Sprint(events) != "[open close]" {
		t.Errorf("got %v, %v", events, err)
	}
}

func TestFlowReachesFollowerBeforeTheNext(t *testing.T) {
	live := make(chan admin.Flow)
	c := start(t, &admintest.Backend{Recent: []admin.Flow{flow(admin.FlowOpen)}, Live: live})
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan admin.FlowEvent)
	ended := make(chan error)
	go func() {
		ended <- c.Flows(ctx, true, func(f admin.Flow) error {
			got <- f.Event
			return nil
		})
	}()
	if e := <-got; e != admin.FlowOpen {
		t.Fatalf("first event is %s", e)
	}
	for _, e := range []admin.FlowEvent{admin.FlowUpdate, admin.FlowClose} {
		live <- flow(e)
		if seen := <-got; seen != e {
			t.Fatalf("event is %s, want %s", seen, e)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Flows after the caller's cancel = %v, want nil", err)
	}
}

// countingBackend tells when a stream begins and ends.
type countingBackend struct {
	*admintest.Backend
	began, ended chan struct{}
}

func (b *countingBackend) Flows(ctx context.Context, follow bool, emit func(admin.Flow) error) error {
	b.began <- struct{}{}
	defer func() { b.ended <- struct{}{} }()
	return b.Backend.Flows(ctx, follow, emit)
}

func TestStreamEndsWithItsClient(t *testing.T) {
	b := &countingBackend{&admintest.Backend{}, make(chan struct{}, 1), make(chan struct{}, 1)}
	c := start(t, b)
	conn, err := net.Dial("unix", c.Address())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "GET /v1/flows?follow=true HTTP/1.1\r\nHost: agent\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, "200") {
		t.Fatalf("a follower of a silent agent gets %q, %v, want the header at once", line, err)
	}
	<-b.began
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-b.ended:
	case <-time.After(10 * time.Second):
		t.Fatal("the stream goes on although its client is gone")
	}
}

func TestFollowerLearnsThatTheAgentStopped(t *testing.T) {
	dir := t.TempDir()
	b := &countingBackend{&admintest.Backend{}, make(chan struct{}, 1), make(chan struct{}, 1)}
	stop := admintest.Serve(t, dir, "n1", b)
	c := admin.NewClient(filepath.Join(dir, "n1.sock"))
	defer c.Close()
	ended := make(chan error)
	go func() { ended <- c.Flows(t.Context(), true, func(admin.Flow) error { return nil }) }()
	<-b.began
	stop()
	if err := <-ended; !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "restarting") {
		t.Errorf("Flows = %v, want the end of the stream", err)
	}
}

func TestStreamThatBreaksNamesTheCause(t *testing.T) {
	c := start(t, &admintest.Backend{Recent: []admin.Flow{flow(admin.FlowOpen)}, Err: errors.New("ring is gone")})
	n := 0
	err := c.Flows(t.Context(), false, func(admin.Flow) error { n++; return nil })
	if err == nil || !strings.Contains(err.Error(), "ring is gone") || n != 1 {
		t.Errorf("Flows = %d records and %v, want one and the cause", n, err)
	}
}

func TestEmitErrorEndsTheStream(t *testing.T) {
	c := start(t, &admintest.Backend{Recent: []admin.Flow{flow(admin.FlowOpen), flow(admin.FlowClose)}})
	full := errors.New("disk full")
	n := 0
	err := c.Flows(t.Context(), true, func(admin.Flow) error { n++; return full })
	if !errors.Is(err, full) || n != 1 {
		t.Errorf("Flows = %d records and %v, want one and %v", n, err, full)
	}
}
