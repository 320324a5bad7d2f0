package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// The applications in the pods are processes of their own. Each answers on a unix socket, so
// that the story can ask them what they see, and so that they go on when it has ended.

// serveControl answers on a unix socket until ctx ends.
func serveControl(ctx context.Context, path string, handler http.Handler) error {
	l, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("listen for questions: %w", err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // Serve returns then
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("answer questions: %w", err)
	}
	return nil
}

// answer makes a handler of a question whose answer is JSON.
func answer[T any](question func(*http.Request) (T, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		value, err := question(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		text, err := json.Marshal(value)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = w.Write(text) // who asked has gone then
	}
}

// control asks an application.
type control struct {
	name string
	http *http.Client
}

func newControl(name, socket string) *control {
	return &control{name: name, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}}
}

// ask sends a question and reads the answer into value.
func (c *control) ask(ctx context.Context, path string, question, value any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return fmt.Errorf("ask %s: %w", c.name, err)
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://application/"+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("ask %s: %w", c.name, err)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return fmt.Errorf("ask %s: %w", c.name, err)
	}
	text, err := io.ReadAll(response.Body)
	err = errors.Join(err, response.Body.Close())
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(string(bytes.TrimSpace(text)))
	}
	if err == nil {
		err = json.Unmarshal(text, value)
	}
	if err != nil {
		return fmt.Errorf("ask %s: %w", c.name, err)
	}
	return nil
}

// read is what the question of a request says.
func read[T any](r *http.Request) (question T, err error) {
	if err := json.NewDecoder(r.Body).Decode(&question); err != nil {
		return question, fmt.Errorf("read the question: %w", err)
	}
	return question, nil
}
