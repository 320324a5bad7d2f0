package lazyctx_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/hbone/lazyctx"
)

var errCut = errors.New("cut")

// What ends it shows to who waits and to who only asks, whichever comes first.
func TestEndsAsOthersDo(t *testing.T) {
	wait := func(c context.Context) { c.Done() }
	for _, c := range []struct {
		name          string
		before, after func(context.Context)
	}{
		{"somebody waits", wait, func(context.Context) {}},
		{"somebody waits afterwards", func(context.Context) {}, wait},
		{"nobody waits", func(context.Context) {}, func(context.Context) {}},
	} {
		for _, byParent := range []bool{false, true} {
			parent, cancel := context.WithCancelCause(t.Context())
			ctx := lazyctx.New(parent, 0)
			c.before(ctx)
			if ctx.Err() != nil {
				t.Errorf("%s: it has ended for %v", c.name, ctx.Err())
			}
			if byParent {
				cancel(errCut)
			} else {
				ctx.End(errCut)
				ctx.End(nil)
			}
			c.after(ctx)
			if !errors.Is(ctx.Err(), context.Canceled) || !errors.Is(context.Cause(ctx), errCut) {
				t.Errorf("%s, by its parent %v: %v for %v", c.name, byParent, ctx.Err(), context.Cause(ctx))
			}
			<-ctx.Done()
			ctx.End(nil)
			cancel(nil)
		}
	}
}

func TestTimeBeginsWhenSomebodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := lazyctx.New(t.Context(), time.Second)
		defer ctx.End(nil)
		time.Sleep(time.Hour)
		if ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
		if _, ok := ctx.Deadline(); ok {
			t.Error("it has a deadline before somebody waits")
		}
		began := time.Now()
		child, cancel := context.WithCancel(ctx)
		defer cancel()
		<-child.Done()
		if time.Since(began) != time.Second || !errors.Is(ctx.Err(), context.DeadlineExceeded) || !errors.Is(context.Cause(child), context.DeadlineExceeded) {
			t.Errorf("%v after %v, %v", ctx.Err(), time.Since(began), context.Cause(child))
		}
	})
}

func TestCostsOneAllocation(t *testing.T) {
	parent := t.Context()
	if n := testing.AllocsPerRun(100, func() {
		ctx := lazyctx.New(parent, time.Second)
		if ctx.Err() != nil {
			t.Error(ctx.Err())
		}
		ctx.End(nil)
	}); n > 1 {
		t.Errorf("%v allocations", n)
	}
}
