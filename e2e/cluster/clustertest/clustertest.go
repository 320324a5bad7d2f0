// Package clustertest makes clusters for tests: skipped where they cannot be, with the logs
// of a test that failed, and with proof that nothing remains.
package clustertest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/cluster"
	"github.com/raceway-mesh/raceway/e2e/cluster/parts"
)

// Require skips the test without root, or without the parts of a cluster. Where
// RACEWAY_REQUIRE_ROOT=1 or RACEWAY_REQUIRE_PEERS=1 says so, it fails the test instead.
func Require(t testing.TB) {
	t.Helper()
	netnstest.Require(t)
	_, err := parts.Find(t.Context())
	switch {
	case err == nil:
	case errors.Is(err, parts.ErrNotBuilt) && os.Getenv("RACEWAY_REQUIRE_PEERS") != "1":
		t.Skip(err)
	default:
		t.Fatal(err)
	}
}

// Start starts a cluster that ends with the test.
func Start(t testing.TB, config cluster.Config) *cluster.Cluster {
	t.Helper()
	Require(t)
	if config.Log == nil {
		config.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	c, err := cluster.Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	stop := CloseOnInterrupt(c)
	t.Cleanup(func() {
		defer stop()
		if t.Failed() {
			t.Log(State(context.Background(), c))
			t.Log(c.Logs())
		}
		if err := c.Close(); err != nil {
			t.Error("close the cluster:", err)
		}
		for _, left := range cluster.Leftovers() {
			t.Error("left behind:", left)
		}
	})
	return c
}

// State is what an administrator looks at first.
func State(ctx context.Context, c *cluster.Cluster) string {
	var state strings.Builder
	for _, args := range [][]string{
		{"get", "nodes,pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
	} {
		out, err := c.Kubectl(ctx, append(args, "--request-timeout=10s")...)
		if err != nil {
			out += err.Error()
		}
		fmt.Fprintf(&state, "kubectl %s\n%s\n", strings.Join(args, " "), out)
	}
	return state.String()
}

// CloseOnInterrupt closes the cluster when the tests are interrupted, and then lets the
// signal do what it would have done. The caller calls stop.
func CloseOnInterrupt(c *cluster.Cluster) (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ended:
			signal.Stop(signals)
		case s := <-signals:
			if err := c.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "close the cluster after a signal:", err)
			}
			signal.Stop(signals)
			signal.Reset(s)
			if number, ok := s.(syscall.Signal); ok {
				if err := syscall.Kill(os.Getpid(), number); err != nil {
					fmt.Fprintln(os.Stderr, "signal ourselves:", err)
				}
			}
		}
	}()
	return func() { close(ended); <-done }
}
