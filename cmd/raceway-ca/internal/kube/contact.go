package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	contactInterval = 5 * time.Second
	// contactPatience is how long the API server may be silent before the replica is taken
	// out of the service: two lost requests and a bit.
	contactPatience = 3*contactInterval + timeout
)

// contact asks now and then whether the API server answers, and knows us.
type contact struct {
	client kubernetes.Interface
	log    *slog.Logger

	mu   sync.Mutex
	last time.Time // of an answer
	err  error     // of the last attempt
}

func (c *contact) run(ctx context.Context) {
	tick := time.NewTicker(contactInterval)
	defer tick.Stop()
	for {
		c.ask(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (c *contact) ask(ctx context.Context) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := c.client.AuthenticationV1().SelfSubjectReviews().Create(limited, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err != nil && c.err == nil:
		c.log.Warn("the API server does not answer: no caller can be known", "error", err)
	case err == nil && c.err != nil:
		c.log.Info("the API server answers again")
	}
	if c.err = err; err == nil {
		c.last = time.Now()
	}
}

var errNoContact = errors.New("the API server has not been reached yet")

func (c *contact) check(now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.last.IsZero() && c.err == nil:
		return errNoContact
	case c.last.IsZero():
		return fmt.Errorf("%w: %w", errNoContact, c.err)
	case now.Sub(c.last) > contactPatience:
		return fmt.Errorf("the API server has not answered for %s: %w", now.Sub(c.last).Round(time.Second), c.err)
	}
	return nil
}
