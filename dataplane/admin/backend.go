package admin

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
)

// Backend answers the API's questions. The agent implements it, and so does Client.
// Its methods may be called concurrently; they answer with what they know at that moment
// and do not wait for anything to change.
//
// An *Error chooses the HTTP status of the answer; any other error is an internal one.
type Backend interface {
	Workloads(ctx context.Context) ([]Workload, error)
	Services(ctx context.Context) ([]Service, error)
	Policies(ctx context.Context) ([]Policy, error)
	Certificates(ctx context.Context) ([]Certificate, error)
	Connections(ctx context.Context) ([]Connection, error)
	// Flows hands the recent flow records to emit, oldest first, and then, when follow is
	// set, each one that happens, until ctx ends or emit returns an error: it returns that
	// error, and nil when ctx ended. emit blocks while its reader is slow: records that
	// pile up meanwhile are dropped, the data plane never waits.
	Flows(ctx context.Context, follow bool, emit func(Flow) error) error
	Why(ctx context.Context, q WhyQuery) (Why, error)
	// Check looks at what is in force now, pod by pod. It may take seconds.
	Check(ctx context.Context) ([]Finding, error)
	Version(ctx context.Context) (Version, error)
	LogLevel(ctx context.Context) (slog.Level, error)
	SetLogLevel(ctx context.Context, level slog.Level) error
}

// WhyQuery is the question of `raceway why SRC DST:PORT`. Package explain describes the
// forms of its names.
type WhyQuery struct {
	Source      string // a pod
	Destination string // host:port
	// From is the namespace where a source without one is looked up; "" is all of them.
	From string
}

// Error is an answer other than success.
type Error struct {
	Status  int    `json:"-"` // the HTTP status
	Message string `json:"error"`
	// Candidates are the names that an unknown or ambiguous one may have meant.
	Candidates []string `json:"candidates,omitempty"`
}

func (e *Error) Error() string {
	if len(e.Candidates) == 0 {
		return e.Message
	}
	return e.Message + ": did you mean " + strings.Join(e.Candidates, ", ") + "?"
}

// Invalid is a question that cannot be read.
func Invalid(message string) *Error { return &Error{Status: http.StatusBadRequest, Message: message} }

// NotReady is the answer of an agent that cannot give one yet.
func NotReady(message string) *Error {
	return &Error{Status: http.StatusServiceUnavailable, Message: message}
}

// Outcomes of a Why.
const (
	OutcomeTunnel  = "tunnel"  // through mutually authenticated HBONE
	OutcomeKernel  = "kernel"  // between two pods of a node: authorized, and not encrypted
	OutcomePlain   = "plain"   // in clear, past the data plane or through it
	OutcomeRefused = "refused" // the source's side ends it: nowhere to go, or no way to go safely
	OutcomeDenied  = "denied"  // a policy at the destination ends it
	OutcomeUnknown = "unknown" // it depends on what is still under way
)
