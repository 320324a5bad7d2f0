package kube

import (
	"context"
	"log/slog"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

// quietly has client-go log to the source's own logger.
func (s *Source) quietly(ctx context.Context) context.Context {
	return klog.NewContext(ctx, logr.FromSlogHandler(quiet{s.config.Log.Handler()}))
}

// quiet makes debug records of all that client-go logs: what matters of it is in Problems,
// and is logged once.
type quiet struct {
	slog.Handler
}

func (q quiet) Enabled(ctx context.Context, _ slog.Level) bool {
	return q.Handler.Enabled(ctx, slog.LevelDebug)
}

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	if !q.Enabled(ctx, r.Level) {
		return nil // logr asks for no leave to log an error
	}
	r.Level = slog.LevelDebug
	return q.Handler.Handle(ctx, r)
}

func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }

func (q quiet) WithGroup(name string) slog.Handler { return quiet{q.Handler.WithGroup(name)} }
