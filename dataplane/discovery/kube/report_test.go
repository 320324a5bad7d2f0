package kube

import (
	"slices"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// invalid tells of each policy that cannot be read.
func invalid(s *dataplane.Snapshot) []Policy {
	var list []Policy
	for _, p := range s.AuthorizationPolicies() {
		row := Policy{Kind: object.KindAuthorizationPolicy, Name: p.Name}
		if p.Invalid != "" {
			row.Issues = []string{p.Invalid, "so it denies all"}
		}
		list = append(list, row)
	}
	return list
}

func (r *rig) policy(name string) *unstructured.Unstructured {
	r.t.Helper()
	o, err := r.dynamic.Tracker().Get(policyResource(object.KindAuthorizationPolicy), "shop", name)
	if err != nil {
		r.t.Fatal(err)
	}
	return o.(*unstructured.Unstructured).DeepCopy()
}

func (r *rig) update(u *unstructured.Unstructured) {
	r.t.Helper()
	if err := r.dynamic.Tracker().Update(policyResource(object.KindAuthorizationPolicy), u, "shop"); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) condition(name string) metav1.Condition {
	r.t.Helper()
	it := convert(object.KindAuthorizationPolicy, r.policy(name))
	if it.fault != "" {
		r.t.Fatal(it.fault)
	}
	c, _ := it.policy.condition()
	return c
}

// events lists the reasons of the Events that were made.
func (r *rig) events() []string {
	r.t.Helper()
	list, err := r.client.EventsV1().Events("shop").List(r.t.Context(), metav1.ListOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	var reasons []string
	for _, e := range list.Items {
		reasons = append(reasons, e.Regarding.Name+" "+e.Reason)
	}
	slices.Sort(reasons)
	return reasons
}

// writes counts the patches of policies.
func (r *rig) writes() int {
	n := 0
	for _, action := range r.dynamic.Actions() {
		if action.GetVerb() == "patch" {
			n++
		}
	}
	return n
}

func TestPoliciesSayWhatIsNotEnforced(t *testing.T) {
	bad := authorization(t, "bad", `{"action": "DENY", "rule": [{}]}`)
	theirs := map[string]any{"type": "istio.io/Else", "status": "True", "reason": "R", "message": "", "lastTransitionTime": "2026-11-01T00:00:00Z"}
	if err := unstructured.SetNestedSlice(bad.Object, []any{theirs}, "status", "conditions"); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, shop(), bad, authorization(t, "good", `{"action": "DENY", "rules": [{}]}`))
	r.config.Issues = invalid
	r.run()
	r.eventually("the condition", func() bool { return r.condition("bad").Status == metav1.ConditionFalse })
	c := r.condition("bad")
	if c.Reason != reasonNotEnforced || !strings.Contains(c.Message, `unknown field "rule"; so it denies all`) || c.ObservedGeneration != 1 {
		t.Errorf("condition = %+v", c)
	}
	if got := r.condition("good"); got.Type != "" {
		t.Errorf("a policy that is enforced has the condition %+v", got)
	}
	if list, _, _ := unstructured.NestedSlice(r.policy("bad").Object, "status", "conditions"); len(list) != 2 {
		t.Errorf("conditions = %v, want another's beside ours", list)
	}
	r.eventually("the Event", func() bool { return slices.Equal(r.events(), []string{"bad " + reasonNotEnforced}) })
	n := r.writes()
	r.always("it is written once", func() bool { return r.writes() == n })

	good := authorization(t, "bad", `{"action": "DENY", "rules": [{}]}`)
	good.SetGeneration(2)
	good.Object["status"] = r.policy("bad").Object["status"]
	r.update(good)
	r.eventually("it is solved", func() bool { return r.condition("bad").Status == metav1.ConditionTrue })
	if c := r.condition("bad"); c.ObservedGeneration != 2 || c.Reason != reasonEnforced {
		t.Errorf("condition = %+v", c)
	}
	r.eventually("the Events", func() bool {
		return slices.Equal(r.events(), []string{"bad " + reasonEnforced, "bad " + reasonNotEnforced})
	})
}

// Whoever else writes the status is not overruled, and not fought.
func TestConflictIsLeftToTheNextLook(t *testing.T) {
	r := newRig(t, shop(), authorization(t, "bad", `{"action": "DENY", "rule": [{}]}`))
	r.config.Issues = invalid
	r.answers("patch authorizationpolicies", apierrors.NewConflict(schema.GroupResource{Resource: "authorizationpolicies"}, "bad", nil))
	r.run()
	r.eventually("a try", func() bool { return r.writes() > 0 })
	r.answers("patch authorizationpolicies", nil)
	touched := r.policy("bad")
	touched.SetLabels(map[string]string{"touched": "yes"})
	r.update(touched)
	r.eventually("the condition", func() bool { return r.condition("bad").Status == metav1.ConditionFalse })
}

func TestAgentWithoutNewsWritesNothing(t *testing.T) {
	r := newRig(t, shop(), authorization(t, "bad", `{"action": "DENY", "rule": [{}]}`))
	r.config.Issues = invalid
	r.run()
	r.eventually("the condition", func() bool { return r.condition("bad").Status == metav1.ConditionFalse })
	r.stop()
	n := r.writes()
	r.client.ClearActions()
	r.config.Pod.Name = "agent-2"
	r.run()
	r.until("a snapshot", policies(1))
	r.always("nothing is written", func() bool { return r.writes() == n })
	for _, action := range r.client.Actions() {
		if action.GetResource().Resource == "leases" {
			t.Errorf("it campaigned: %v", action)
		}
	}
}

func TestShortenedNotes(t *testing.T) {
	if got := shortened(strings.Repeat("é", maxNote)); len(got) > maxNote+len("…") || !strings.HasSuffix(got, "é…") {
		t.Errorf("%d bytes, ending %q", len(got), got[len(got)-8:])
	}
}
