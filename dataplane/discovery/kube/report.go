package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

const (
	// conditionEnforced is the type of the condition that tells of a policy whether all of
	// it is enforced as it is written.
	conditionEnforced = "raceway.dev/Enforced"
	reasonEnforced    = "Enforced"
	reasonNotEnforced = "NotEnforcedAsWritten"

	statusLease = "raceway-policy-status"
	// controller is who Events are from.
	controller = "raceway.dev/agent"
	// maxNote bounds an Event's text, as the API server does.
	maxNote = 1000
	// writesAtOnce bounds the policies that are written before it is looked again.
	writesAtOnce = 20
)

// verdict is what the status of a policy is to say.
type verdict struct {
	key     object.Key
	policy  policy
	issues  []string
	changed bool // from what it says now, so that it is worth an Event
}

func (v *verdict) condition(now time.Time) metav1.Condition {
	c := metav1.Condition{
		Type: conditionEnforced, Status: metav1.ConditionTrue, Reason: reasonEnforced,
		Message: "all of it is enforced as written", ObservedGeneration: v.policy.generation, LastTransitionTime: metav1.NewTime(now),
	}
	if len(v.issues) > 0 {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, reasonNotEnforced, strings.Join(v.issues, "; ")
	}
	if before, there := v.policy.condition(); there && before.Status == c.Status {
		c.LastTransitionTime = before.LastTransitionTime
	}
	return c
}

// Report keeps the status of policies that are not enforced as written saying so, until ctx
// ends. All agents may run it: who sees something to write campaigns for a lease, after a
// moment that differs from agent to agent, so that mostly one of them does and finds the
// others content.
func (s *Source) Report(ctx context.Context) error {
	if s.config.Issues == nil || s.config.Pod == (dataplane.Name{}) {
		return nil
	}
	ctx = s.quietly(ctx)
	pause := s.pace.campaign
	l := &lease{leases: s.config.Client.Leases(s.config.Pod.Namespace), name: statusLease, holder: s.config.Pod.Name, term: s.pace.term}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.reports:
		}
		if len(s.verdicts()) == 0 {
			continue
		}
		if !sleep(ctx, rand.N(pause)) {
			return nil
		}
		before := len(s.verdicts())
		if before == 0 {
			continue
		}
		s.campaign(ctx, l)
		s.reports.give() // whoever held the lease may have left something
		if len(s.verdicts()) < before {
			pause = s.pace.campaign
		} else {
			pause = min(2*pause, s.pace.term)
		}
	}
}

// campaign writes what there is to write while it holds the lease. It ends when there is
// nothing left, or when another agent holds it for longer than it should take.
func (s *Source) campaign(ctx context.Context, l *lease) {
	ctx, cancel := context.WithTimeout(ctx, s.pace.term)
	defer cancel()
	var told error
	for {
		held, err := l.take(ctx)
		switch {
		case held != nil:
			s.writeUnder(ctx, l, held)
			return
		case err != nil && told == nil && ctx.Err() == nil:
			s.config.Log.Warn("the status of policies waits to be written", "error", err)
			told = err
		}
		if !sleep(ctx, s.pace.term/6) {
			return
		}
	}
}

// writeUnder gives others time to see that the term is over before they may begin.
func (s *Source) writeUnder(ctx context.Context, l *lease, held *coordinationv1.Lease) {
	writing, cancel := context.WithTimeout(ctx, s.pace.term*2/3)
	defer cancel()
	s.writeVerdicts(writing)
	giving, cancel := context.WithTimeout(context.WithoutCancel(ctx), patchTimeout)
	defer cancel()
	if err := l.give(giving, held); err != nil {
		s.config.Log.Debug("others wait for the end of the term", "error", err)
	}
}

func (s *Source) writeVerdicts(ctx context.Context) {
	list := s.verdicts()
	for _, v := range list[:min(len(list), writesAtOnce)] {
		err := s.writeVerdict(ctx, &v)
		if err == nil {
			continue
		}
		if ctx.Err() == nil {
			s.config.Log.Warn("write the status of a policy", "policy", v.key.String(), "error", err)
		}
		if !isAnswer(err) {
			return
		}
	}
}

// verdicts lists the policies whose status does not say what it should. It is empty while
// that is not known: before the last change of policies is published, and without API server.
func (s *Source) verdicts() []verdict {
	s.mu.Lock()
	snapshot, edits := s.snapshot, s.edits
	known := snapshot != nil && s.judged == edits && s.syncedLocked() && s.health.since.IsZero()
	s.mu.Unlock()
	if !known {
		return nil
	}
	policies := s.config.Issues(snapshot)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.edits != edits {
		return nil
	}
	var list []verdict
	for _, p := range policies {
		key := object.Key{Kind: p.Kind, Name: p.Name}
		written := s.writing[key]
		if written == nil || written.uid == "" {
			continue
		}
		v := verdict{key: key, policy: *written, issues: p.Issues}
		before, there := written.condition()
		want := v.condition(time.Now())
		switch {
		case !there && len(p.Issues) == 0: // nobody said otherwise
		case there && before.Status == want.Status && before.Message == want.Message && before.ObservedGeneration == want.ObservedGeneration:
		default:
			v.changed = !there || before.Status != want.Status || before.Message != want.Message
			list = append(list, v)
		}
	}
	slices.SortFunc(list, func(a, b verdict) int { return a.key.Compare(b.key) })
	return list
}

// writeVerdict puts our condition among those of others, and tells of the change.
func (s *Source) writeVerdict(ctx context.Context, v *verdict) error {
	condition := v.condition(time.Now())
	conditions := []any{condition}
	for _, c := range v.policy.conditions {
		if fields, ok := c.(map[string]any); !ok || fields["type"] != conditionEnforced {
			conditions = append(conditions, c)
		}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": v.policy.resourceVersion}, // others may write, too
		"status":   map[string]any{"conditions": conditions},
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patchTimeout)
	defer cancel()
	now, err := s.config.Dynamic.Resource(policyResource(v.key.Kind)).Namespace(v.key.Name.Namespace).
		Patch(ctx, v.key.Name.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: controller}, "status")
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // a watch will tell
	}
	if err != nil {
		return err
	}
	s.wrote(v, convert(v.key.Kind, now))
	if !v.changed {
		return nil
	}
	return s.tell(ctx, v, condition)
}

// wrote takes in what the watch will say, too: until then nothing is to be done twice. A
// policy that the watch has shown to be gone by now stays so.
func (s *Source) wrote(v *verdict, now *item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.writing[v.key]; p != nil && p.resourceVersion == v.policy.resourceVersion && now.fault == "" {
		s.writing[v.key] = now.policy
	}
}

// tell makes an Event of a policy's new condition.
func (s *Source) tell(ctx context.Context, v *verdict, condition metav1.Condition) error {
	kind := corev1.EventTypeNormal
	if condition.Status == metav1.ConditionFalse {
		kind = corev1.EventTypeWarning
	}
	now := time.Now()
	event := &eventsv1.Event{
		ObjectMeta:          metav1.ObjectMeta{Name: fmt.Sprintf("%.200s.%x", v.key.Name.Name, now.UnixNano()), Namespace: v.key.Name.Namespace},
		EventTime:           metav1.NewMicroTime(now),
		ReportingController: controller, ReportingInstance: s.config.Pod.Name,
		Action: "Enforce", Reason: condition.Reason, Type: kind, Note: shortened(condition.Message),
		Regarding: corev1.ObjectReference{
			APIVersion: policyGroup + "/v1", Kind: string(v.key.Kind), Namespace: v.key.Name.Namespace, Name: v.key.Name.Name,
			UID: types.UID(v.policy.uid), ResourceVersion: v.policy.resourceVersion,
		},
	}
	_, err := s.config.Client.Events(v.key.Name.Namespace).Create(ctx, event, metav1.CreateOptions{})
	// A namespace on its way out takes no more.
	if err != nil && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("event: %w", err)
	}
	return nil
}

// shortened cuts a text where a character begins.
func shortened(text string) string {
	if len(text) <= maxNote {
		return text
	}
	return strings.ToValidUTF8(text[:maxNote], "") + "…"
}

// Staleness is for how long the API server has not answered, 0 while it does.
func (s *Source) Staleness() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	since := s.health.since
	if since.IsZero() {
		return 0
	}
	return cmp.Or(time.Since(since), 1)
}
