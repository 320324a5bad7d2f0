package kube

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/certs/istio"
)

// Review is how a token was judged; its text is a metric label.
type Review string

// Outcomes of a review.
const (
	ReviewAccepted Review = "accepted"
	ReviewRefused  Review = "refused" // by the API server, or by what it says of the caller
	ReviewFailed   Review = "failed"  // the API server gave no answer
	ReviewCached   Review = "cached"  // accepted moments ago
	ReviewSkipped  Review = "skipped" // the token's own claims show that it cannot be accepted
)

// Reviews lists every outcome.
func Reviews() []Review {
	return []Review{ReviewAccepted, ReviewRefused, ReviewFailed, ReviewCached, ReviewSkipped}
}

// Names of what the API server says beside the user, of a token that is bound to a pod; the
// node's since Kubernetes 1.30.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
)

const userPrefix = "system:serviceaccount:"

const (
	cacheTTL = 30 * time.Second
	maxCache = 16384 // entries: several for each node of a large cluster
	// inFlight bounds reviews: what a rollout of all agents may cost the API server.
	inFlight = 16
)

// reviewer asks the API server who has a token.
type reviewer struct {
	cfg   Config
	pods  *pods
	turns chan struct{}

	mu       sync.Mutex
	accepted map[[sha256.Size]byte]acceptance
}

type acceptance struct {
	caller istio.Caller
	until  time.Time
}

func newReviewer(cfg Config, pods *pods) *reviewer {
	return &reviewer{cfg: cfg, pods: pods, turns: make(chan struct{}, inFlight), accepted: map[[sha256.Size]byte]acceptance{}}
}

func denied(format string, args ...any) error {
	return &istio.DeniedError{Reason: fmt.Sprintf(format, args...)}
}

func (r *reviewer) authenticate(ctx context.Context, token string) (istio.Caller, error) {
	began := time.Now()
	said, err := readClaims(token)
	if err == nil {
		err = r.plausible(said, began)
	}
	if err != nil {
		r.cfg.OnReview(ReviewSkipped, 0)
		return istio.Caller{}, err
	}
	hash := sha256.Sum256([]byte(token))
	if caller, ok := r.known(hash, began); ok {
		r.cfg.OnReview(ReviewCached, 0)
		return caller, nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	select {
	case r.turns <- struct{}{}:
		defer func() { <-r.turns }()
	case <-ctx.Done():
		r.cfg.OnReview(ReviewFailed, time.Since(began))
		return istio.Caller{}, fmt.Errorf("review token: %d others are waiting for the API server: %w", inFlight, ctx.Err())
	}
	// Many calls of an agent that starts wait together; one review is enough for them.
	if caller, ok := r.known(hash, time.Now()); ok {
		r.cfg.OnReview(ReviewCached, 0)
		return caller, nil
	}
	asked := time.Now()
	caller, outcome, err := r.review(ctx, token)
	r.cfg.OnReview(outcome, time.Since(asked))
	if err != nil {
		return istio.Caller{}, err
	}
	until := asked.Add(cacheTTL)
	if said.expires().Before(until) {
		until = said.expires()
	}
	r.keep(hash, acceptance{caller: caller, until: until})
	return caller, nil
}

// plausible judges what the token says of itself. Nothing is granted by it: it keeps tokens
// that cannot be accepted, which anybody can send, from the API server.
func (r *reviewer) plausible(said claims, now time.Time) error {
	switch {
	case !now.Before(said.expires()):
		return denied("the token has expired at %s: is the clock right, is the token file a projected volume that the kubelet renews?", said.expires().UTC().Format(time.RFC3339))
	case !intersect(said.Audience, r.cfg.Audiences):
		return denied("the token is for the audience %q, not for %q", said.Audience, r.cfg.Audiences)
	}
	_, err := r.account(said.Subject)
	return err
}

// account returns the service account of a user that may call.
func (r *reviewer) account(user string) (Name, error) {
	namespace, name, found := strings.Cut(strings.TrimPrefix(user, userPrefix), ":")
	account := Name{namespace, name}
	if !strings.HasPrefix(user, userPrefix) || !found || !slices.Contains(r.cfg.Agents, account) {
		return Name{}, denied("%s may not ask for certificates: the CA's --node-agent names who may", user)
	}
	return account, nil
}

func (r *reviewer) review(ctx context.Context, token string) (istio.Caller, Review, error) {
	answer, err := r.cfg.Client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: r.cfg.Audiences},
	}, metav1.CreateOptions{})
	if err != nil {
		return istio.Caller{}, ReviewFailed, fmt.Errorf("review token: %w", err)
	}
	status := answer.Status
	switch {
	case !status.Authenticated:
		return istio.Caller{}, ReviewRefused, denied("the API server does not accept the token: %s", status.Error)
	case !intersect(status.Audiences, r.cfg.Audiences):
		// Also none at all, as from a server or webhook that knows nothing of audiences.
		return istio.Caller{}, ReviewRefused, denied("the API server accepts the token for the audience %q, not for %q", status.Audiences, r.cfg.Audiences)
	}
	account, err := r.account(status.User.Username)
	if err != nil {
		return istio.Caller{}, ReviewRefused, err
	}
	return r.place(ctx, account, status.User.Extra)
}

// place finds the caller's pod and node by what the API server says of the token alone.
func (r *reviewer) place(ctx context.Context, account Name, extra map[string]authenticationv1.ExtraValue) (istio.Caller, Review, error) {
	name, uid := single(extra, extraPodName), single(extra, extraPodUID)
	if name == "" || uid == "" {
		return istio.Caller{}, ReviewRefused, denied("the token is not bound to a pod: use a projected service account token")
	}
	caller := istio.Caller{Node: single(extra, extraNodeName), Pod: Name{account.Namespace, name}.String()}
	if caller.Node == "" {
		node, err := r.pods.look(ctx, Name{account.Namespace, name}, uid, account.Name)
		if err != nil {
			return istio.Caller{}, ReviewFailed, fmt.Errorf("the token names no node (before Kubernetes 1.30): %w", err)
		}
		if node == "" {
			return istio.Caller{}, ReviewRefused, denied("the token names no node, and no live pod %s with its UID and service account is on one", caller.Pod)
		}
		caller.Node = node
	}
	if seen := r.pods.nodeOf(uid); seen != "" && seen != caller.Node {
		return istio.Caller{}, ReviewRefused, denied("the token says that pod %s is on node %s, the pod says %s", caller.Pod, caller.Node, seen)
	}
	return caller, ReviewAccepted, nil
}

// single returns the value of a key that has exactly one.
func single(extra map[string]authenticationv1.ExtraValue, key string) string {
	if values := extra[key]; len(values) == 1 {
		return values[0]
	}
	return ""
}

func intersect(a, b []string) bool {
	return slices.ContainsFunc(a, func(s string) bool { return slices.Contains(b, s) })
}

func (r *reviewer) known(hash [sha256.Size]byte, now time.Time) (istio.Caller, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, ok := r.accepted[hash]
	if !ok || !now.Before(a.until) {
		delete(r.accepted, hash)
		return istio.Caller{}, false
	}
	return a.caller, true
}

func (r *reviewer) keep(hash [sha256.Size]byte, a acceptance) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.accepted) >= maxCache {
		now := time.Now()
		for h, old := range r.accepted {
			if !now.Before(old.until) {
				delete(r.accepted, h)
			}
		}
	}
	if len(r.accepted) < maxCache {
		r.accepted[hash] = a
	}
}
