package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"
)

// dialTimeout is short: the agent is on this machine.
const dialTimeout = 2 * time.Second

// Client asks one agent. It is safe for concurrent use.
type Client struct {
	address string // the socket's path, or what a dialer's agent is called
	local   bool   // it is a socket's path
	http    *http.Client
}

var _ Backend = (*Client)(nil)

// NewClient asks the agent behind a unix socket of this machine. It connects with the first
// call; Close releases idle connections.
func NewClient(socket string) *Client {
	dialer := &net.Dialer{Timeout: dialTimeout}
	c := NewDialingClient(socket, func(ctx context.Context) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", socket)
	})
	c.local = true
	return c
}

// NewDialingClient asks the agent that dial leads to; address is what errors call it.
func NewDialingClient(address string, dial func(context.Context) (net.Conn, error)) *Client {
	transport := &http.Transport{
		DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		ResponseHeaderTimeout: answerTimeout + writeTimeout,
	}
	return &Client{address: address, http: &http.Client{Transport: transport}}
}

// Address is what it was made with.
func (c *Client) Address() string { return c.address }

// Close releases idle connections; the client stays usable.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Workloads implements Backend.
func (c *Client) Workloads(ctx context.Context) ([]Workload, error) {
	return get[[]Workload](ctx, c, "/v1/workloads", nil)
}

// Services implements Backend.
func (c *Client) Services(ctx context.Context) ([]Service, error) {
	return get[[]Service](ctx, c, "/v1/services", nil)
}

// Policies implements Backend.
func (c *Client) Policies(ctx context.Context) ([]Policy, error) {
	return get[[]Policy](ctx, c, "/v1/policies", nil)
}

// Certificates implements Backend.
func (c *Client) Certificates(ctx context.Context) ([]Certificate, error) {
	return get[[]Certificate](ctx, c, "/v1/certificates", nil)
}

// Connections implements Backend.
func (c *Client) Connections(ctx context.Context) ([]Connection, error) {
	return get[[]Connection](ctx, c, "/v1/connections", nil)
}

// Check implements Backend.
func (c *Client) Check(ctx context.Context) ([]Finding, error) {
	return get[[]Finding](ctx, c, "/v1/check", nil)
}

// Version implements Backend.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return get[Version](ctx, c, "/v1/version", nil)
}

// Why implements Backend.
func (c *Client) Why(ctx context.Context, q WhyQuery) (Why, error) {
	params := url.Values{"source": {q.Source}, "destination": {q.Destination}}
	if q.From != "" {
		params.Set("from", q.From)
	}
	return get[Why](ctx, c, "/v1/why", params)
}

// LogLevel implements Backend.
func (c *Client) LogLevel(ctx context.Context) (slog.Level, error) {
	l, err := get[logLevel](ctx, c, "/v1/log-level", nil)
	return l.Level, err
}

// SetLogLevel implements Backend.
func (c *Client) SetLogLevel(ctx context.Context, level slog.Level) error {
	body, err := json.Marshal(logLevel{level})
	if err != nil {
		return fmt.Errorf("write the level: %w", err)
	}
	resp, err := c.do(ctx, http.MethodPut, "/v1/log-level", nil, bytes.NewReader(body))
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Flows implements Backend. A stream that the agent ends although it was to follow is
// io.ErrUnexpectedEOF.
func (c *Client) Flows(ctx context.Context, follow bool, emit func(Flow) error) (err error) {
	params := url.Values{"follow": {strconv.FormatBool(follow)}}
	resp, err := c.do(ctx, http.MethodGet, "/v1/flows", params, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	lines := json.NewDecoder(resp.Body)
	for {
		var line struct {
			Flow
			Error string `json:"error"`
		}
		switch err := lines.Decode(&line); {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, io.EOF) && !follow:
			return nil
		case errors.Is(err, io.EOF):
			return fmt.Errorf("the agent ended the stream, it may be restarting: %w", io.ErrUnexpectedEOF)
		case err != nil:
			return fmt.Errorf("read the agent's flows: %w", err)
		case line.Error != "":
			return &Error{Status: resp.StatusCode, Message: line.Error}
		}
		if err := emit(line.Flow); err != nil {
			return err
		}
	}
}

func get[T any](ctx context.Context, c *Client, path string, params url.Values) (answer T, err error) {
	resp, err := c.do(ctx, http.MethodGet, path, params, nil)
	if err != nil {
		return answer, err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return answer, fmt.Errorf("read the agent's answer to %s: %w", path, err)
	}
	return answer, nil
}

// do returns a response only when it is a success; the caller closes its body.
func (c *Client) do(ctx context.Context, method, path string, params url.Values, body io.Reader) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "agent", Path: path, RawQuery: params.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", path, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	answer := &Error{Status: resp.StatusCode}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(answer); err != nil || answer.Message == "" {
		answer.Message = "the agent answered " + resp.Status + " to " + path
	}
	return nil, errors.Join(answer, resp.Body.Close())
}

// explain gives a failed exchange the reason that an operator can act on.
func (c *Client) explain(err error) error {
	var op *net.OpError
	if !c.local || !errors.As(err, &op) || op.Op != "dial" {
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err // without the URL, which names a host that does not exist
		}
		return fmt.Errorf("ask the agent at %s: %w", c.address, err)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("no agent socket at %s: is raceway-agent running on this node? (%w)", c.address, op.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nobody listens at %s: raceway-agent is not running any more (%w)", c.address, op.Err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("open %s: %w: run this as root", c.address, fs.ErrPermission)
	}
	return fmt.Errorf("connect to %s: %w", c.address, op.Err)
}
