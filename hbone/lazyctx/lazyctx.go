// Package lazyctx makes contexts that cost next to nothing until somebody waits for them: no channel, no
// timer, no entry with their parent. A connection whose set-up never waits needs none of those.
package lazyctx

import (
	"context"
	"sync"
	"time"
)

// Context ends with its parent, with End, or when its time is over, which begins when somebody waits for
// it: with Done, or with a context that is made of it.
type Context struct {
	parent  context.Context
	timeout time.Duration // 0 for none

	mu     sync.Mutex
	made   context.Context // nil before somebody waits
	cancel context.CancelCauseFunc
	stop   context.CancelFunc // the timer's
	ended  bool
	cause  error
}

var _ context.Context = (*Context)(nil)

// New makes one. End must be called.
func New(parent context.Context, timeout time.Duration) *Context {
	return &Context{parent: parent, timeout: timeout}
}

// End ends it for cause, as a context.CancelCauseFunc does.
func (c *Context) End(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	c.ended, c.cause = true, cause
	if c.made != nil {
		c.endLocked()
	}
}

func (c *Context) endLocked() {
	c.cancel(c.cause)
	if c.stop != nil {
		c.stop()
	}
}

// context is what it is to who waits.
func (c *Context) context() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.made == nil {
		c.made, c.cancel = context.WithCancelCause(c.parent)
		if c.timeout > 0 {
			c.made, c.stop = context.WithTimeout(c.made, c.timeout)
		}
		if c.ended {
			c.endLocked()
		}
	}
	return c.made
}

// Done is a context.Context's.
func (c *Context) Done() <-chan struct{} { return c.context().Done() }

// Value is a context.Context's. Package context asks for values to learn of causes.
func (c *Context) Value(key any) any { return c.context().Value(key) }

// Deadline is a context.Context's: the parent's before somebody waits.
func (c *Context) Deadline() (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.made != nil {
		return c.made.Deadline()
	}
	return c.parent.Deadline()
}

// Err is a context.Context's.
func (c *Context) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.made != nil:
		return c.made.Err()
	case c.ended:
		return context.Canceled
	}
	return c.parent.Err()
}
