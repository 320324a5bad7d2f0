package kube

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// health is how the last requests went.
type health struct {
	since   time.Time              // the API server answers nothing since then; zero: it does
	cause   string                 // of the first time
	refused map[object.Kind]string // answers that keep a kind from being known
}

// heard takes in how a request for that kind went.
func (s *Source) heard(ctx context.Context, kind object.Kind, err error) {
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.health
	var status apierrors.APIStatus
	answered := err == nil || errors.As(err, &status)
	cause := err
	if request := (*url.Error)(nil); errors.As(err, &request) {
		cause = request.Err // nobody wants to read all of the URL
	}
	switch {
	case answered && !h.since.IsZero():
		s.config.Log.Info("the API server is back", "after", time.Since(h.since).Round(time.Second))
		h.since, h.cause = time.Time{}, ""
		s.reports.give()
	case !answered && h.since.IsZero():
		h.since, h.cause = time.Now(), cause.Error()
		s.changes.give() // the file need not wait for it
		s.config.Log.Warn("the API server is away: what was known last stays in force", "error", cause)
	}
	if !answered {
		return
	}
	switch {
	case err == nil:
		if h.refused[kind] != "" {
			s.config.Log.Info("a kind can be read again", "kind", kind)
		}
		delete(h.refused, kind)
	case apierrors.IsResourceExpired(err), apierrors.IsGone(err), apierrors.IsTooManyRequests(err):
		// Asked again by the reflector, with success.
	default:
		if h.refused[kind] == "" {
			s.config.Log.Warn("a kind cannot be read: what was known of it stays in force", "kind", kind, "error", err)
		}
		if h.refused == nil {
			h.refused = make(map[object.Kind]string)
		}
		h.refused[kind] = err.Error()
	}
}

func (h *health) problems() []discovery.Problem {
	var list []discovery.Problem
	if !h.since.IsZero() {
		list = append(list, discovery.Problem{Where: whereAPI, Cause: fmt.Sprintf(
			"away since %s: what was known then stays in force: %s", h.since.UTC().Format(time.RFC3339), h.cause)})
	}
	for kind, cause := range h.refused {
		list = append(list, discovery.Problem{Where: whereAPI, Cause: fmt.Sprintf("%s: %s", kind, cause)})
	}
	return list
}

const whereAPI = "API server"

// away returns an error when the API server does not answer, for requests that would only
// wait for it.
func (s *Source) away() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.health.since.IsZero() {
		return nil
	}
	return fmt.Errorf("the API server is away since %s: %s", s.health.since.UTC().Format(time.RFC3339), s.health.cause)
}
