package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// logLevel is the body of GET and PUT /v1/log-level.
type logLevel struct {
	Level slog.Level `json:"level"`
}

// route is one resource: what it answers to GET and, for some, to PUT.
type route struct {
	path   string
	params []string
	get    func(context.Context, url.Values) (any, error)
	put    func(context.Context, []byte) (any, error)
}

func (s *Server) routes() []route {
	b := s.backend
	return []route{
		{path: "/v1/workloads", get: list(b.Workloads)},
		{path: "/v1/services", get: list(b.Services)},
		{path: "/v1/policies", get: list(b.Policies)},
		{path: "/v1/certificates", get: list(b.Certificates)},
		{path: "/v1/connections", get: list(b.Connections)},
		{path: "/v1/check", get: list(b.Check)},
		{path: "/v1/version", get: func(ctx context.Context, _ url.Values) (any, error) { return b.Version(ctx) }},
		{path: "/v1/why", params: []string{"source", "destination", "from"}, get: s.why},
		{path: "/v1/log-level", get: s.getLogLevel, put: s.putLogLevel},
	}
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	for _, r := range s.routes() {
		mux.HandleFunc(r.path, func(w http.ResponseWriter, q *http.Request) { s.serve(w, q, r) })
	}
	mux.HandleFunc("/v1/flows", s.flows)
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/", func(w http.ResponseWriter, q *http.Request) {
		s.fail(w, &Error{Status: http.StatusNotFound, Message: fmt.Sprintf("there is no %s: this agent may be older than its client", q.URL.Path)})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if err := authorize(q.Context()); err != nil {
			s.fail(w, &Error{Status: http.StatusForbidden, Message: err.Error()})
			return
		}
		mux.ServeHTTP(w, q)
	})
}

func (s *Server) serve(w http.ResponseWriter, q *http.Request, r route) {
	ctx, cancel := context.WithTimeout(q.Context(), answerTimeout)
	defer cancel()
	answer, err := r.answer(ctx, w, q)
	if err != nil {
		s.fail(w, err)
		return
	}
	s.reply(w, http.StatusOK, answer)
}

func (r *route) answer(ctx context.Context, w http.ResponseWriter, q *http.Request) (any, error) {
	params, err := parameters(q, r.params...)
	if err != nil {
		return nil, err
	}
	switch {
	case q.Method == http.MethodGet:
		return r.get(ctx, params)
	case q.Method == http.MethodPut && r.put != nil:
		body, err := readBody(w, q)
		if err != nil {
			return nil, err
		}
		return r.put(ctx, body)
	}
	allow := "GET"
	if r.put != nil {
		allow = "GET, PUT"
	}
	w.Header().Set("Allow", allow)
	return nil, &Error{Status: http.StatusMethodNotAllowed, Message: fmt.Sprintf("%s takes %s, not %s", r.path, allow, q.Method)}
}

// parameters accepts each of the known parameters at most once, and no others: a mistyped
// one must not widen the answer silently.
func parameters(q *http.Request, known ...string) (url.Values, error) {
	values, err := url.ParseQuery(q.URL.RawQuery)
	if err != nil {
		return nil, Invalid(fmt.Sprintf("query of %s: %v", q.URL.Path, err))
	}
	for name, v := range values {
		switch {
		case !slices.Contains(known, name):
			return nil, Invalid(fmt.Sprintf("%s has no parameter %q", q.URL.Path, name))
		case len(v) > 1:
			return nil, Invalid(fmt.Sprintf("parameter %s is given %d times", name, len(v)))
		case len(v[0]) > maxParameter:
			return nil, Invalid(fmt.Sprintf("parameter %s is longer than %d bytes", name, maxParameter))
		}
	}
	return values, nil
}

func readBody(w http.ResponseWriter, q *http.Request) ([]byte, error) {
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil {
		return nil, fmt.Errorf("bound the time to read a body: %w", err)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, q.Body, maxBodyBytes))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, &Error{Status: http.StatusRequestEntityTooLarge, Message: fmt.Sprintf("the body is larger than %d bytes", maxBodyBytes)}
	}
	if err != nil {
		return nil, Invalid(fmt.Sprintf("read the body: %v", err))
	}
	return body, nil
}

// list makes an empty list of nil, so that programs never meet null.
func list[T any](get func(context.Context) ([]T, error)) func(context.Context, url.Values) (any, error) {
	return func(ctx context.Context, _ url.Values) (any, error) {
		rows, err := get(ctx)
		if rows == nil {
			rows = []T{}
		}
		return rows, err
	}
}

func (s *Server) why(ctx context.Context, q url.Values) (any, error) {
	for _, name := range []string{"source", "destination"} {
		if q.Get(name) == "" {
			return nil, Invalid("parameter " + name + " is missing")
		}
	}
	return s.backend.Why(ctx, WhyQuery{Source: q.Get("source"), Destination: q.Get("destination"), From: q.Get("from")})
}

func (s *Server) getLogLevel(ctx context.Context, _ url.Values) (any, error) {
	level, err := s.backend.LogLevel(ctx)
	return logLevel{level}, err
}

func (s *Server) putLogLevel(ctx context.Context, body []byte) (any, error) {
	var wanted struct {
		Level *slog.Level `json:"level"`
	}
	if err := json.Unmarshal(body, &wanted); err != nil {
		return nil, Invalid(fmt.Sprintf("read the level: %v", err))
	}
	if wanted.Level == nil {
		return nil, Invalid(`the body names no level: send {"level":"DEBUG"}`)
	}
	if err := s.backend.SetLogLevel(ctx, *wanted.Level); err != nil {
		return nil, err
	}
	return s.getLogLevel(ctx, nil)
}

// flows streams one JSON object per line until the client goes, the agent stops or, without
// follow, the recent records end. A line {"error": …} is the last of a stream that broke.
func (s *Server) flows(w http.ResponseWriter, q *http.Request) {
	follow, err := followParameter(q)
	if err != nil {
		s.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/jsonl")
	rc := http.NewResponseController(w)
	line := json.NewEncoder(w)
	send := func(v any) error {
		if err := rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return err
		}
		if err := line.Encode(v); err != nil {
			return err
		}
		return rc.Flush()
	}
	if err := rc.Flush(); err != nil { // the header, so that a follower knows that it is connected
		return
	}
	err = s.backend.Flows(q.Context(), follow, func(f Flow) error { return send(f) })
	if err == nil || q.Context().Err() != nil {
		return
	}
	s.log.Debug("flow stream ended", "error", err)
	if err := send(&Error{Message: err.Error()}); err != nil {
		s.log.Debug("flow stream's reader is gone", "error", err)
	}
}

func followParameter(q *http.Request) (bool, error) {
	if q.Method != http.MethodGet {
		return false, &Error{Status: http.StatusMethodNotAllowed, Message: "/v1/flows takes GET, not " + q.Method}
	}
	params, err := parameters(q, "follow")
	if err != nil || !params.Has("follow") {
		return false, err
	}
	follow, err := strconv.ParseBool(params.Get("follow"))
	if err != nil {
		return false, Invalid(fmt.Sprintf("parameter follow is true or false, not %q", params.Get("follow")))
	}
	return follow, nil
}

func (s *Server) fail(w http.ResponseWriter, err error) {
	answer := (*Error)(nil)
	if !errors.As(err, &answer) {
		answer = &Error{Status: http.StatusInternalServerError, Message: err.Error()}
		if errors.Is(err, context.DeadlineExceeded) {
			answer.Status = http.StatusGatewayTimeout
		}
	}
	if answer.Status == 0 {
		answer.Status = http.StatusInternalServerError
	}
	s.reply(w, answer.Status, answer)
}

func (s *Server) reply(w http.ResponseWriter, status int, answer any) {
	var body strings.Builder
	if err := json.NewEncoder(&body).Encode(answer); err != nil {
		s.log.Error("admin answer cannot be written as JSON", "error", err)
		http.Error(w, `{"error":"the agent cannot write its answer as JSON"}`, http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		s.log.Debug("bound the time to write an admin answer", "error", err)
	}
	w.WriteHeader(status)
	if _, err := io.WriteString(w, body.String()); err != nil {
		s.log.Debug("admin client is gone", "error", err)
	}
}
