package kube

import (
	"context"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// lease is held by one agent at a time, for a term at most. client-go's election would do,
// but renews without end what is held for moments here, and brings the whole clientset along.
type lease struct {
	leases   Objects[*coordinationv1.Lease, *coordinationv1.LeaseList]
	name     string
	holder   string // this agent
	term     time.Duration
	version  string    // in which it was last seen held by another
	heldFrom time.Time // since when it is, by this agent's clock, as others may be wrong; zero: it is not
}

// take returns the lease once this agent holds it, nil while another does.
func (l *lease) take(ctx context.Context) (*coordinationv1.Lease, error) {
	now, err := l.leases.Get(ctx, l.name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		now = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: l.name}}
		l.fill(now)
		now, err = l.leases.Create(ctx, now, metav1.CreateOptions{})
	case err != nil:
	case l.isHeld(now):
		return nil, nil
	default:
		l.fill(now)
		// The API server refuses it if another was faster: it names the version.
		now, err = l.leases.Update(ctx, now, metav1.UpdateOptions{})
	}
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("take the lease %s: %w", l.name, err)
	}
	l.heldFrom = time.Time{}
	return now, nil
}

func (l *lease) fill(in *coordinationv1.Lease) {
	seconds := max(1, int32(l.term/time.Second))
	now := metav1.NewMicroTime(time.Now())
	in.Spec = coordinationv1.LeaseSpec{HolderIdentity: &l.holder, LeaseDurationSeconds: &seconds, AcquireTime: &now, RenewTime: &now}
}

// isHeld reports whether another agent may still act under the lease.
func (l *lease) isHeld(now *coordinationv1.Lease) bool {
	if by := now.Spec.HolderIdentity; by == nil || *by == "" || *by == l.holder {
		return false
	}
	if l.heldFrom.IsZero() || now.ResourceVersion != l.version {
		l.version, l.heldFrom = now.ResourceVersion, time.Now()
	}
	term := l.term
	if seconds := now.Spec.LeaseDurationSeconds; seconds != nil {
		term = max(term, time.Duration(*seconds)*time.Second)
	}
	return time.Since(l.heldFrom) < term
}

// give lets the next have it.
func (l *lease) give(ctx context.Context, held *coordinationv1.Lease) error {
	nobody := ""
	held.Spec.HolderIdentity = &nobody
	_, err := l.leases.Update(ctx, held, metav1.UpdateOptions{})
	if err != nil && !apierrors.IsConflict(err) {
		return fmt.Errorf("give the lease %s back: %w", l.name, err)
	}
	return nil
}
