package kube

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	ktesting "k8s.io/client-go/testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// Two agents of a node write the file while one takes over from the other.
func TestTwoWritersLeaveOneWholeFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snapshot")
	stray := path + ".1.tmp"
	if err := os.WriteFile(stray, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(stray, old, old); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for _, letter := range []string{"a", "b"} {
		writers.Go(func() {
			for range 20 {
				err := writeFile(path, func(w io.Writer) error {
					for range 100 {
						if _, err := io.WriteString(w, strings.Repeat(letter, 100)); err != nil {
							return err
						}
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				got, err := os.ReadFile(path)
				if err != nil || len(got) != 10_000 || len(bytes.Trim(got, string(got[:1]))) > 0 {
					t.Errorf("%d bytes of both writers, %v", len(got), err)
				}
			}
		})
	}
	writers.Wait()
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("left: %v, %v", files, err)
	}
}

func TestFailedWriteLeavesTheFileAsItWas(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(path, []byte("good"), 0o600); err != nil {
		t.Fatal(err)
	}
	full := errors.New("no space left")
	if err := writeFile(path, func(io.Writer) error { return full }); !errors.Is(err, full) {
		t.Errorf("error = %v", err)
	}
	if got, err := os.ReadFile(path); string(got) != "good" || err != nil {
		t.Errorf("file = %q, %v", got, err)
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("left: %v, %v", files, err)
	}
}

func TestFileIsReadUpToALimit(t *testing.T) {
	good := exampleSnapshot(t)
	if _, _, err := readSnapshot(bytes.NewReader(good), 1<<20); err != nil {
		t.Fatal(err)
	}
	for limit := range int64(400) {
		if _, _, err := readSnapshot(bytes.NewReader(good), limit); err == nil {
			t.Fatalf("read with a limit of %d bytes", limit)
		}
	}
}

// What a release removed does not come back with the next change of the cluster.
func TestReleasedMeshLeavesNoFile(t *testing.T) {
	r := newRig(t, shop(), meshConfig("true"))
	if err := os.WriteFile(r.config.SnapshotFile+".1.tmp", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.config.SnapshotFile, exampleSnapshot(t), 0o600); err != nil {
		t.Fatal(err)
	}
	r.run()
	r.until("the release", (*dataplane.Snapshot).Released)
	empty := func() bool {
		files, err := os.ReadDir(filepath.Dir(r.config.SnapshotFile))
		return err == nil && len(files) == 0
	}
	r.eventually("no file", empty)
	r.create(running("web", "node-1", "10.0.0.1"))
	r.until("the pod", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID != "" })
	r.always("no file", empty)
}

// Of two agents with the same news, one tells.
func TestOneOfTwoAgentsWrites(t *testing.T) {
	var bad []string
	r := newRig(t, shop())
	for n := range 5 {
		bad = append(bad, fmt.Sprintf("bad-%d", n))
		r.create(authorization(t, bad[n], `{"action": "DENY", "rule": [{}]}`))
	}
	r.config.Issues = invalid
	other := &rig{t: t, config: r.config, pace: r.pace, log: r.log, stop: func() {}}
	other.config.Pod.Name, other.config.SnapshotFile = "agent-2", ""
	other.run()
	defer other.stop()
	r.run()
	r.eventually("the conditions", func() bool {
		return !slices.ContainsFunc(bad, func(name string) bool { return r.condition(name).Status != metav1.ConditionFalse })
	})
	r.eventually("the Events", func() bool { return len(r.events()) >= len(bad) })
	r.always("one Event each", func() bool { return len(r.events()) == len(bad) })
	if n := r.writes(); n != len(bad) {
		t.Errorf("%d writes for %d policies", n, len(bad))
	}
}

// One policy whose status nobody may write does not keep others from theirs.
func TestPolicyThatCannotBeWritten(t *testing.T) {
	r := newRig(t, shop(), authorization(t, "a", `{"action": "DENY", "rule": [{}]}`), authorization(t, "b", `{"action": "DENY", "rule": [{}]}`))
	r.config.Issues = invalid
	r.dynamic.PrependReactor("patch", "authorizationpolicies", refuse("a"))
	r.run()
	r.eventually("the other's condition", func() bool { return r.condition("b").Status == metav1.ConditionFalse })
	if c := r.condition("a"); c.Type != "" {
		t.Errorf("condition = %+v", c)
	}
}

// What was written is not news of a policy that is gone by then.
func TestVerdictRevivesNothing(t *testing.T) {
	r := newRig(t)
	source, err := New(r.config)
	if err != nil {
		t.Fatal(err)
	}
	it := convert(object.KindAuthorizationPolicy, authorization(t, "bad", `{"action": "DENY", "rule": [{}]}`))
	source.take(it)
	v := verdict{key: it.key, policy: *it.policy}
	source.drop(it.key, it.uid)
	source.wrote(&v, it)
	if _, there := source.set.Get(it.key); there || source.writing[it.key] != nil {
		t.Error("the policy is back")
	}
}

// The captured pod of a StatefulSet goes, and its successor takes no tunnels before it says so.
func TestCaptureDoesNotPassToASuccessor(t *testing.T) {
	for _, node := range []string{"node-1", "node-2"} {
		t.Run(node, func(t *testing.T) {
			r := newRig(t, shop(), withAnnotation(running("db", node, "10.0.0.1"), true))
			r.run()
			r.until("the capture", captured("db"))
			if err := r.source.PublishCaptured(t.Context(), []string{"uid-db"}, nil); err != nil {
				t.Fatal(err)
			}
			next := running("db", node, "10.0.0.2")
			next.UID = "uid-next"
			r.deletePod("db")
			r.create(next)
			s := r.until("the successor", func(s *dataplane.Snapshot) bool { return workload(s, "db").UID == "uid-next" })
			if workload(s, "db").Captured {
				t.Error("it is captured")
			}
			// The API server refuses to annotate what the agent does not mean.
			if err := r.source.PublishCaptured(t.Context(), []string{"uid-db"}, nil); err != nil || r.annotated("db") {
				t.Errorf("annotated = %v, %v", r.annotated("db"), err)
			}
		})
	}
}

func TestCaptureDoesNotStickToHostNetworkOrAfterTheRelease(t *testing.T) {
	host := withAnnotation(running("host", "node-2", "192.0.2.1"), true)
	host.Spec.HostNetwork = true
	r := newRig(t, shop(), host, withAnnotation(running("db", "node-2", "10.0.0.1"), true), meshConfig("true"))
	r.run()
	r.until("the release", (*dataplane.Snapshot).Released)
	for _, name := range []string{"host", "db"} {
		r.updatePod(withAnnotation(r.pod(name), false))
		r.until(name+" is plain", func(s *dataplane.Snapshot) bool { return !captured(name)(s) })
	}
}

// Where many cannot be annotated, each is named, and the others are annotated.
func TestPartOfThePodsCannotBeAnnotated(t *testing.T) {
	r := newRig(t, shop(), running("a", "node-1", "10.0.0.1"), running("b", "node-1", "10.0.0.2"), running("c", "node-1", "10.0.0.3"))
	r.client.PrependReactor("patch", "pods", refuse("b"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	err := r.source.PublishCaptured(t.Context(), []string{"uid-a", "uid-b", "uid-c"}, nil)
	if err == nil || !strings.Contains(err.Error(), "pod shop/b: ") || strings.Contains(err.Error(), "shop/a") {
		t.Errorf("error = %v", err)
	}
	if !r.annotated("a") || r.annotated("b") || !r.annotated("c") {
		t.Errorf("annotated: a %v, b %v, c %v", r.annotated("a"), r.annotated("b"), r.annotated("c"))
	}
	r.always("repairs are logged once", func() bool {
		return strings.Count(r.log.String(), "repair the annotations") <= 1
	})
}

// refuse forbids a patch of the object of that name.
func refuse(name string) ktesting.ReactionFunc {
	return func(action ktesting.Action) (bool, runtime.Object, error) {
		if action.(ktesting.PatchAction).GetName() != name {
			return false, nil, nil
		}
		return true, nil, apierrors.NewForbidden(schema.GroupResource{}, name, errors.New("a webhook says no"))
	}
}
