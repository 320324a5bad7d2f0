package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

type client struct {
	timeout time.Duration
	from    int // port, 0 for any
}

// Count is what a client has seen so far.
type Count struct {
	Done   int    `json:"done"`
	Failed int    `json:"failed"`
	Error  string `json:"error,omitempty"` // the last
	At     string `json:"at,omitempty"`    // when that was
	Slow   string `json:"slowest"`
}

func (c *Count) add(err error, took, slowest time.Duration) time.Duration {
	c.Done++
	if err != nil {
		c.Failed++
		c.Error, c.At = err.Error(), time.Now().UTC().Format(time.RFC3339Nano)
	}
	slowest = max(slowest, took)
	c.Slow = slowest.String()
	return slowest
}

func (c client) request(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", resp.Status, body)
	}
	return body, nil
}

func (c client) get(ctx context.Context, url string, n int) error {
	var body []byte
	for range n {
		var err error
		if body, err = c.request(ctx, url); err != nil {
			return err
		}
	}
	_, err := os.Stdout.Write(body)
	return err
}

func (c client) dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: c.timeout}
	if c.from != 0 {
		d.LocalAddr = &net.TCPAddr{Port: c.from}
		d.Control = reuse
	}
	return d.DialContext(ctx, "tcp", address)
}

func reuse(_, _ string, conn syscall.RawConn) error {
	var failed error
	err := conn.Control(func(fd uintptr) { failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
	return errors.Join(err, failed)
}

// exchange sends text and wants it back.
func (c client) exchange(conn net.Conn, text []byte) error {
	if err := conn.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return err
	}
	if _, err := conn.Write(text); err != nil {
		return err
	}
	back := make([]byte, len(text))
	if _, err := io.ReadFull(conn, back); err != nil {
		return err
	}
	if string(back) != string(text) {
		return fmt.Errorf("sent %q, got %q", text, back)
	}
	return nil
}

func (c client) echo(ctx context.Context, address, text string) error {
	conn, err := c.dial(ctx, address)
	if err != nil {
		return err
	}
	if err := errors.Join(c.exchange(conn, []byte(text)), conn.Close()); err != nil {
		return err
	}
	fmt.Println(text)
	return nil
}

// ask sends a datagram again each second, as who uses UDP must.
func (c client) ask(ctx context.Context, address, text string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	back := make([]byte, 64<<10)
	for end := time.Now().Add(c.timeout); ; {
		if _, err := conn.Write([]byte(text)); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(min(time.Second, c.timeout))); err != nil {
			return err
		}
		n, err := conn.Read(back)
		switch {
		case err == nil && string(back[:n]) != text:
			return fmt.Errorf("sent %q, got %q", text, back[:n])
		case err == nil:
			fmt.Println(text)
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end):
			return err
		}
	}
}

func (c client) resolve(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	fmt.Println(addrs)
	return nil
}

// loop ends with ctx, whatever fails.
func (c client) loop(ctx context.Context, url string, every time.Duration) error {
	return report(ctx, every, func() error {
		// A request that is under way is to end by itself.
		_, err := c.request(context.WithoutCancel(ctx), url)
		return err
	}, false)
}

// hold ends with ctx, or when the connection breaks.
func (c client) hold(ctx context.Context, address string, every time.Duration) error {
	conn, err := c.dial(ctx, address)
	if err != nil {
		return err
	}
	err = report(ctx, every, func() error { return c.exchange(conn, []byte("still there?")) }, true)
	return errors.Join(err, conn.Close())
}

// report calls use again and again and prints the count each second, and at the end.
func report(ctx context.Context, every time.Duration, use func() error, once bool) error {
	var (
		count   Count
		slowest time.Duration
		printed time.Time
	)
	out := json.NewEncoder(os.Stdout)
	for {
		start := time.Now()
		err := use()
		slowest = count.add(err, time.Since(start), slowest)
		if err != nil || time.Since(printed) > time.Second {
			printed = time.Now()
			if err := out.Encode(count); err != nil {
				return err
			}
		}
		if err != nil && once {
			return err
		}
		select {
		case <-ctx.Done():
			return out.Encode(count)
		case <-time.After(every):
		}
	}
}
