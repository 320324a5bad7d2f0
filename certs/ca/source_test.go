package ca

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// memory is a Source whose material is pushed.
type memory struct {
	mu      sync.Mutex
	now     Material
	changes chan struct{}
}

func (s *memory) Load() (Material, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now, nil
}

func (s *memory) Run(ctx context.Context, changed func()) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.changes:
			changed()
		}
	}
}

func (s *memory) push(m Material) {
	s.mu.Lock()
	s.now = m
	s.mu.Unlock()
	s.changes <- struct{}{}
}

func (*memory) Close() error   { return nil }
func (*memory) String() string { return "memory" }

// logged is a log that may be read while it is written.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (a *authority) material(t *testing.T, roots ...*authority) Material {
	t.Helper()
	m := Material{Key: Part{"key", a.keyPEM(t)}, Cert: Part{"cert", encode(a.cert)}, Chain: Part{Name: "chain"}, Roots: Part{Name: "roots"}}
	for _, r := range roots {
		m.Roots.PEM = append(m.Roots.PEM, encode(r.cert)...)
	}
	return m
}

func TestIntermediateIsReplacedUnderTheSameRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root", nil, 1000*time.Hour)
		first, second := newAuthority(t, "first", root, 100*time.Hour), newAuthority(t, "second", root, 200*time.Hour)
		stranger := newAuthority(t, "stranger", newAuthority(t, "another root", nil, time.Hour), time.Hour)
		source := &memory{now: first.material(t, root, root), changes: make(chan struct{})}
		var log logged
		a, err := New(Config{Source: source, TrustDomain: td, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		if len(a.Roots()) != 1 {
			t.Errorf("a root that is there twice counts as %d", len(a.Roots()))
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		push := func(m Material) {
			source.push(m)
			synctest.Wait()
		}
		_, changed := a.Bundle()
		push(stranger.material(t, root))
		if _, chain := sign(t, a, 0); chain[0].CheckSignatureFrom(first.cert) != nil || !strings.Contains(log.String(), "cert: chain to roots by chain") {
			t.Errorf("an intermediate of another root was taken over, or not told of: %s", &log)
		}
		push(second.material(t, root))
		_, chain := sign(t, a, 0)
		if chain[0].CheckSignatureFrom(second.cert) != nil || len(chain) != 3 || !chain[1].Equal(second.cert) || !chain[2].Equal(root.cert) {
			t.Errorf("chain of %d, signed by %s", len(chain), chain[0].Issuer)
		}
		if !a.Expires().Equal(second.cert.NotAfter) {
			t.Errorf("expires %s", a.Expires())
		}
		select {
		case <-changed:
		default:
			t.Error("the change was not told")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestTheEndIsToldOfBeforehand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root", nil, 100*24*time.Hour)
		var log logged
		source := &memory{now: root.material(t, root)}
		a, err := New(Config{Source: source, TrustDomain: td, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		time.Sleep(79 * 24 * time.Hour) // in the bubble's time
		synctest.Wait()
		if strings.Contains(log.String(), "expires soon") {
			t.Error("told too early")
		}
		time.Sleep(26 * time.Hour)
		synctest.Wait()
		if !strings.Contains(log.String(), "expires soon") {
			t.Error("not told a fifth of its life before the end")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
