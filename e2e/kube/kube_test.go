// Package kube tests Raceway on a real Kubernetes (package cluster), installed from its chart
// as users install it. All tests share one cluster, which starts with the first of them; each
// has namespaces of its own.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/raceway-mesh/raceway/e2e/cluster"
	"github.com/raceway-mesh/raceway/e2e/cluster/clustertest"
)

// world is the cluster and what users have to work with it.
type world struct {
	*cluster.Cluster
	client  *kubernetes.Clientset
	raceway string // the command line's path
	helm    string

	families  cluster.IPFamilies
	stop      func()
	installed bool
}

var (
	shared   *world
	startErr error
	families cluster.IPFamilies // that tests want; a shared cluster of others is replaced
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := closeShared(); err != nil {
		fmt.Fprintln(os.Stderr, "close the cluster:", err)
		code = 1
	}
	os.Exit(code)
}

// closeShared ends the shared cluster, if there is one, and wants nothing to be left of it.
func closeShared() error {
	if shared == nil {
		return nil
	}
	shared.stop()
	errs := []error{shared.Close()}
	shared = nil
	for _, left := range cluster.Leftovers() {
		errs = append(errs, fmt.Errorf("left behind: %s", left))
	}
	return errors.Join(errs...)
}

// onCluster is the shared cluster, without Raceway unless a test before has left it there.
// A test that fails shows what an administrator would look at.
func onCluster(t *testing.T) *world {
	t.Helper()
	clustertest.Require(t)
	if shared != nil && shared.families != families {
		if err := closeShared(); err != nil {
			t.Error(err)
		}
	}
	if shared == nil && startErr == nil {
		shared, startErr = startWorld()
	}
	if startErr != nil {
		t.Fatal(startErr)
	}
	w := shared
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.state())
		}
	})
	return w
}

// slow leaves a test out where time is short: CI has an hour for everything.
func slow(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes minutes: it runs without -short, by `make e2e`")
	}
}

// onMesh is the shared cluster with Raceway on it.
func onMesh(t *testing.T) *world {
	t.Helper()
	w := onCluster(t)
	if !w.installed {
		w.install(t)
	}
	return w
}

// startTimeout is for a cluster, the images and the programs.
const startTimeout = 10 * time.Minute

func startWorld() (_ *world, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	c, err := cluster.Start(ctx, cluster.Config{IPFamilies: families, Log: log})
	if err != nil {
		return nil, err
	}
	w := &world{Cluster: c, families: families, stop: clustertest.CloseOnInterrupt(c)}
	defer func() {
		if err != nil {
			w.stop()
			err = errors.Join(err, c.Close())
		}
	}()
	if w.client, err = c.Client(); err != nil {
		return nil, err
	}
	if err := w.build(ctx); err != nil {
		return nil, err
	}
	return w, c.LoadApp(ctx)
}

// state is what matters when something has failed.
func (w *world) state() string {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var out strings.Builder
	out.WriteString(clustertest.State(ctx, w.Cluster))
	for _, component := range []string{"agent", "ca"} {
		logs, err := w.Kubectl(ctx, "-n", system, "logs", "--selector=app.kubernetes.io/component="+component,
			"--prefix", "--tail=60", "--all-containers", "--request-timeout=10s")
		fmt.Fprintf(&out, "logs of the %s (%v):\n%s\n", component, err, logs)
	}
	return out.String()
}

// patience is how long a test waits for what must come. It is generous: nothing here asserts
// speed, and after an outage each part of Kubernetes looks for the API server again only every
// minute, one waiting for the other.
const patience = 3 * time.Minute

// eventually repeats probe until it returns nil.
func eventually(t *testing.T, what string, probe func() error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(250 * time.Millisecond) {
		err := probe()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
	}
}

// kubectl wants success, and returns the output without its last newline.
func (w *world) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (w *world) apply(t *testing.T, manifest string) {
	t.Helper()
	if err := w.Apply(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
}
