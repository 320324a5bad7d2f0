package kube

import (
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"
)

func TestLeaseHasOneHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		of := func(holder string) *lease {
			return &lease{leases: client.CoordinationV1().Leases("raceway-system"), name: "l", holder: holder, term: time.Minute}
		}
		take := func(l *lease, want bool) *coordinationv1.Lease {
			t.Helper()
			held, err := l.take(t.Context())
			if err != nil || (held != nil) != want {
				t.Fatalf("%s holds %v and %v, want %v", l.holder, held, err, want)
			}
			return held
		}
		one, two := of("one"), of("two")
		held := take(one, true)
		take(two, false)
		if err := one.give(t.Context(), held); err != nil {
			t.Fatal(err)
		}
		take(two, true)
		take(two, true) // one's own

		// Two is gone. Its clock does not count, only for how long one has seen it hold on.
		take(one, false)
		time.Sleep(59 * time.Second)
		take(one, false)
		time.Sleep(time.Second)
		take(one, true)
	})
}

func TestLeaseThatAnotherWasFasterToTakeIsNotHeld(t *testing.T) {
	client := fake.NewClientset()
	faster := error(apierrors.NewAlreadyExists(coordinationv1.Resource("leases"), "l"))
	refuse := func(ktesting.Action) (bool, runtime.Object, error) { return true, nil, faster }
	client.PrependReactor("create", "leases", refuse)
	client.PrependReactor("update", "leases", refuse)
	l := &lease{leases: client.CoordinationV1().Leases("raceway-system"), name: "l", holder: "one", term: time.Minute}
	if held, err := l.take(t.Context()); held != nil || err != nil {
		t.Errorf("created: %v, %v", held, err)
	}
	faster = apierrors.NewConflict(coordinationv1.Resource("leases"), "l", nil)
	if err := client.Tracker().Add(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "raceway-system", Name: "l"}}); err != nil {
		t.Fatal(err)
	}
	if held, err := l.take(t.Context()); held != nil || err != nil {
		t.Errorf("updated: %v, %v", held, err)
	}
}
