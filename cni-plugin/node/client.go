package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"

	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// Client is the plugin's end. It is safe for concurrent use, and holds no connection between
// two calls. How long a call may take is its context's to say.
type Client struct {
	socket string
	http   *http.Client
}

var _ Handler = (*Client)(nil)

// NewClient connects with each call.
func NewClient(socket string) *Client {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	return &Client{socket: socket, http: &http.Client{Transport: transport}}
}

// Add implements Handler. Its errors wrap ErrAway, ErrNotReady or neither, as do those of
// Check and Del.
func (c *Client) Add(ctx context.Context, s discovery.Sandbox) (captured bool, err error) {
	a, err := c.ask(ctx, pathAdd, s)
	return a.Captured, err
}

// Check implements Handler.
func (c *Client) Check(ctx context.Context, s discovery.Sandbox) error {
	_, err := c.ask(ctx, pathCheck, s)
	return err
}

// Del implements Handler.
func (c *Client) Del(ctx context.Context, s discovery.Sandbox) error {
	_, err := c.ask(ctx, pathDel, s)
	return err
}

func (c *Client) ask(ctx context.Context, path string, s discovery.Sandbox) (answer, error) {
	body, err := json.Marshal(sandbox(s))
	if err != nil {
		return answer{}, fmt.Errorf("write the request: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return answer{}, fmt.Errorf("ask the agent: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return answer{}, c.explain(ctx, err)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxBodyBytes))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return answer{}, c.explain(ctx, err)
	}
	var a answer
	if err := json.Unmarshal(text, &a); err != nil {
		return answer{}, fmt.Errorf("read the agent's answer: %w", err)
	}
	switch {
	case resp.StatusCode == http.StatusOK:
		return a, nil
	case resp.StatusCode == http.StatusServiceUnavailable:
		return answer{}, &notReady{a.Error}
	case a.Error == "":
		return answer{}, fmt.Errorf("the agent answered %s to %s", resp.Status, path)
	}
	return answer{}, errors.New(a.Error)
}

// notReady is the agent's ErrNotReady in the agent's words.
type notReady struct{ message string }

func (e *notReady) Error() string { return e.message }

func (e *notReady) Is(target error) bool { return target == ErrNotReady }

// explain tells an agent that is away from one that does not answer in time. A connection
// that breaks, in whatever way net/http calls it, is one that is away by now.
func (c *Client) explain(ctx context.Context, err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err // without the URL, which names a host that does not exist
	}
	var op *net.OpError
	dial := errors.As(err, &op) && op.Op == "dial"
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("ask the agent at %s: %w", c.socket, ctx.Err())
	case dial && errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: there is no socket %s", ErrAway, c.socket)
	case dial && errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nobody listens at %s", ErrAway, c.socket)
	case dial:
		return fmt.Errorf("%w, or cannot be reached: connect to %s: %w", ErrAway, c.socket, op.Err)
	}
	return fmt.Errorf("%w: it went while it was asked at %s (%w)", ErrAway, c.socket, err)
}
