package kube

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const td = "cluster.local"

var (
	agentAccount = Name{"raceway-system", "raceway-agent"}
	secretName   = Name{"raceway-system", "raceway-ca"}
	bundleName   = Name{"raceway-system", "raceway-ca-root"}
	errAway      = errors.New("connection refused")
)

// config is that of a Cluster in front of a fake API server.
func config(client *fake.Clientset, edit func(*Config)) Config {
	cfg := Config{
		Client: client, TrustDomain: td, Secret: secretName, Generate: true, Root: ca.Root{TrustDomain: td},
		Bundle: bundleName, Audiences: []string{"raceway-ca"}, Agents: []Name{agentAccount},
	}
	if edit != nil {
		edit(&cfg)
	}
	return cfg
}

func newCluster(t *testing.T, client *fake.Clientset, edit func(*Config)) *Cluster {
	t.Helper()
	c, err := New(config(client, edit))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// runs runs f until the test ends.
func runs(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func newPod(name Name, account, node string, edit func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: name.Namespace, Name: name.Name, UID: types.UID(name.Name + "-uid")},
		Spec:       corev1.PodSpec{ServiceAccountName: account, NodeName: node},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	if edit != nil {
		edit(p)
	}
	return p
}

// token looks like a service account's; nothing has signed it.
func token(t *testing.T, edit func(map[string]any)) string {
	t.Helper()
	claims := map[string]any{
		"sub": userPrefix + "raceway-system:raceway-agent", "aud": []string{"raceway-ca"}, "exp": time.Now().Add(time.Hour).Unix(),
	}
	if edit != nil {
		edit(claims)
	}
	data, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return "e30." + base64.RawURLEncoding.EncodeToString(data) + ".c2ln"
}

// accepted is what the API server says of an agent's token.
func accepted(edit func(*authenticationv1.TokenReviewStatus)) authenticationv1.TokenReviewStatus {
	status := authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{"raceway-ca"},
		User: authenticationv1.UserInfo{
			Username: userPrefix + "raceway-system:raceway-agent",
			Extra: map[string]authenticationv1.ExtraValue{
				extraPodName: {"agent-1"}, extraPodUID: {"agent-1-uid"}, extraNodeName: {"n1"},
			},
		},
	}
	if edit != nil {
		edit(&status)
	}
	return status
}

// server answers reviews; its fields may change between calls.
type server struct {
	*fake.Clientset

	mu      sync.Mutex
	status  authenticationv1.TokenReviewStatus
	err     error
	asked   int
	outcome []Review
}

func newServer(objects ...runtime.Object) *server {
	s := &server{Clientset: fake.NewClientset(objects...), status: accepted(nil)}
	s.PrependReactor("create", "tokenreviews", func(action clienttesting.Action) (bool, runtime.Object, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked++
		review := action.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		if len(review.Spec.Audiences) == 0 || review.Spec.Token == "" {
			return true, nil, errors.New("the review lacks its audience or token")
		}
		review.Status = s.status
		return true, review, s.err
	})
	return s
}

func (s *server) reviewed(outcome Review, _ time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.outcome = append(s.outcome, outcome)
}

func isDenied(err error) bool {
	var denied *istio.DeniedError
	return errors.As(err, &denied)
}

func TestCallersAreKnownByWhatTheAPIServerSays(t *testing.T) {
	type status = authenticationv1.TokenReviewStatus
	without := func(keys ...string) func(*status) {
		return func(s *status) {
			for _, key := range keys {
				delete(s.User.Extra, key)
			}
		}
	}
	agent := func(edit func(*corev1.Pod)) *corev1.Pod {
		return newPod(Name{"raceway-system", "agent-1"}, "raceway-agent", "n1", edit)
	}
	for _, tt := range []struct {
		name    string
		claims  func(map[string]any)
		said    func(*status)
		err     error
		pod     *corev1.Pod
		outcome Review
		text    string // of the error; "" is accepted, on node n1
	}{
		{name: "a node's agent", outcome: ReviewAccepted},
		{name: "one audience as text", claims: func(c map[string]any) { c["aud"] = "raceway-ca" }, outcome: ReviewAccepted},
		{name: "one audience of several", claims: func(c map[string]any) { c["aud"] = []string{"api", "raceway-ca"} }, outcome: ReviewAccepted},
		{name: "expired", claims: func(c map[string]any) { c["exp"] = time.Now().Add(-time.Second).Unix() }, outcome: ReviewSkipped, text: "expired"},
		{name: "wrong audience", claims: func(c map[string]any) { c["aud"] = []string{"api"} }, outcome: ReviewSkipped, text: `for the audience ["api"]`},
		{name: "other service account", claims: func(c map[string]any) { c["sub"] = userPrefix + "shop:web" }, outcome: ReviewSkipped, text: "shop:web may not ask"},
		{name: "same name in another namespace", claims: func(c map[string]any) { c["sub"] = userPrefix + "shop:raceway-agent" }, outcome: ReviewSkipped, text: "may not ask"},
		{name: "a user", claims: func(c map[string]any) { c["sub"] = "admin" }, outcome: ReviewSkipped, text: "admin may not ask"},
		{name: "without an end", claims: func(c map[string]any) { delete(c, "exp") }, outcome: ReviewSkipped, text: "not that of a service account"},
		{name: "refused", said: func(s *status) { *s = status{Error: "token has been invalidated"} }, outcome: ReviewRefused, text: "invalidated"},
		{name: "an audience that is not confirmed", said: func(s *status) { s.Audiences = nil }, outcome: ReviewRefused, text: "accepts the token for the audience"},
		{name: "another audience confirmed", said: func(s *status) { s.Audiences = []string{"api"} }, outcome: ReviewRefused, text: `["api"]`},
		{name: "claims that the server contradicts", said: func(s *status) { s.User.Username = userPrefix + "shop:web" }, outcome: ReviewRefused, text: "shop:web may not ask"},
		{name: "not bound to a pod", said: without(extraPodName, extraPodUID), outcome: ReviewRefused, text: "not bound to a pod"},
		{name: "two nodes", said: func(s *status) { s.User.Extra[extraNodeName] = authenticationv1.ExtraValue{"n1", "n2"} }, outcome: ReviewRefused, text: "names no node"},
		{name: "no node, the pod is known", said: without(extraNodeName), pod: agent(nil), outcome: ReviewAccepted},
		{name: "no node, no pod", said: without(extraNodeName), outcome: ReviewRefused, text: "names no node"},
		{name: "no node, another pod of that name", said: without(extraNodeName), pod: agent(func(p *corev1.Pod) { p.UID = "other" }), outcome: ReviewRefused, text: "names no node"},
		{name: "no node, another account's pod", said: without(extraNodeName), pod: agent(func(p *corev1.Pod) { p.Spec.ServiceAccountName = "web" }), outcome: ReviewRefused, text: "names no node"},
		{name: "no node, a pod that has ended", said: without(extraNodeName), pod: agent(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), outcome: ReviewRefused, text: "names no node"},
		{name: "a node that the pod contradicts", pod: agent(func(p *corev1.Pod) { p.Spec.NodeName = "n2" }), outcome: ReviewRefused, text: "is on node n1, the pod says n2"},
		{name: "API server away", err: errAway, outcome: ReviewFailed, text: "connection refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newServer()
			if tt.pod != nil {
				s = newServer(tt.pod)
			}
			s.status, s.err = accepted(tt.said), tt.err
			c := newCluster(t, s.Clientset, func(cfg *Config) { cfg.OnReview = s.reviewed })
			runs(t, c.Run)
			eventually(t, "pods are read", func() bool { return c.pods.ready() == nil })
			text := token(t, tt.claims)
			caller, err := c.Authenticate(t.Context(), text)
			if len(s.outcome) != 1 || s.outcome[0] != tt.outcome {
				t.Errorf("outcome %v, want %s", s.outcome, tt.outcome)
			}
			if asked := tt.outcome != ReviewSkipped; (s.asked == 1) != asked {
				t.Errorf("the API server was asked %d times", s.asked)
			}
			if tt.text == "" {
				if err != nil || caller != (istio.Caller{Node: "n1", Pod: "raceway-system/agent-1"}) {
					t.Errorf("%+v, %v", caller, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.text) || isDenied(err) == (tt.err != nil) || caller != (istio.Caller{}) {
				t.Errorf("%+v, %v, want %q", caller, err, tt.text)
			}
			if strings.Contains(err.Error(), text) {
				t.Error("the error tells the token")
			}
		})
	}
}

func TestWhatIsNoTokenIsNotReviewed(t *testing.T) {
	s := newServer()
	c := newCluster(t, s.Clientset, nil)
	for _, text := range []string{"", "x", "a.b.c", "e30.e30.e30", "e30." + strings.Repeat("A", maxTokenBytes) + ".x", "e30.!.x"} {
		if _, err := c.Authenticate(t.Context(), text); !isDenied(err) {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	if s.asked != 0 {
		t.Errorf("the API server was asked %d times", s.asked)
	}
}

func TestReviewsAreRememberedBriefly(t *testing.T) {
	s := newServer()
	c := newCluster(t, s.Clientset, func(cfg *Config) { cfg.OnReview = s.reviewed })
	lasting := token(t, nil)
	soon := time.Now().Add(3 * time.Second)
	short := token(t, func(claims map[string]any) { claims["exp"] = soon.Unix() })
	for _, text := range []string{lasting, lasting, short, short} {
		if _, err := c.Authenticate(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	if s.asked != 2 {
		t.Errorf("asked %d times for two tokens", s.asked)
	}
	bounded := false
	for hash, a := range c.reviews.accepted {
		if time.Until(a.until) > cacheTTL {
			t.Errorf("one is remembered for %s", time.Until(a.until))
		}
		if a.until.Equal(time.Unix(soon.Unix(), 0)) {
			bounded = true
		}
		if _, ok := c.reviews.known(hash, a.until); ok { // which forgets it
			t.Error("it is known past its time")
		}
	}
	if !bounded {
		t.Error("a review is remembered for longer than its token is valid")
	}
	s.mu.Lock()
	s.status = accepted(func(status *authenticationv1.TokenReviewStatus) { status.Authenticated = false })
	s.mu.Unlock()
	for range 2 { // refusals are not remembered
		if _, err := c.Authenticate(t.Context(), lasting); !isDenied(err) {
			t.Errorf("after its review was forgotten: %v", err)
		}
	}
	if s.asked != 4 {
		t.Errorf("asked %d times, want 4", s.asked)
	}
}

func TestReviewsAreBounded(t *testing.T) {
	s := newServer()
	c := newCluster(t, s.Clientset, nil)
	for range inFlight {
		c.reviews.turns <- struct{}{}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Authenticate(ctx, token(t, nil)); err == nil || isDenied(err) || s.asked != 0 {
		t.Errorf("%v, asked %d times", err, s.asked)
	}
}

func TestANodeMayHaveTheIdentitiesOfItsPods(t *testing.T) {
	shop := func(name string) Name { return Name{"shop", name} }
	s := newServer(
		newPod(shop("web-1"), "web", "n1", nil),
		newPod(shop("db-1"), "db", "n2", nil),
		newPod(shop("job-1"), "job", "n1", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }),
		newPod(shop("new-1"), "new", "n1", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }),
		newPod(shop("waiting-1"), "waiting", "", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }),
	)
	c := newCluster(t, s.Clientset, nil)
	id := func(account string) spiffe.ID {
		return spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: account}
	}
	n1 := istio.Caller{Node: "n1"}
	if err := c.Authorize(t.Context(), n1, id("web")); !errors.Is(err, errNotSynced) {
		t.Errorf("before the pods are read: %v", err)
	}
	runs(t, c.Run)
	eventually(t, "pods are read", func() bool { return c.pods.ready() == nil })
	for _, tt := range []struct {
		name, node string
		id         spiffe.ID
		granted    bool
	}{
		{"own pod", "n1", id("web"), true},
		{"own pod without an address yet", "n1", id("new"), true},
		{"another node's pod", "n1", id("db"), false},
		{"own pod, asked for by another node", "n2", id("web"), false},
		{"finished pod", "n1", id("job"), false},
		{"pod on no node", "n1", id("waiting"), false},
		{"pod on no node, asked for by no node", "", id("waiting"), false},
		{"account that no pod uses", "n1", id("admin"), false},
		{"same account elsewhere", "n1", spiffe.ID{TrustDomain: td, Namespace: "bank", ServiceAccount: "web"}, false},
		{"another trust domain", "n1", spiffe.ID{TrustDomain: "far.example", Namespace: "shop", ServiceAccount: "web"}, false},
	} {
		err := c.Authorize(t.Context(), istio.Caller{Node: tt.node}, tt.id)
		if tt.granted != (err == nil) || err != nil && !isDenied(err) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestAPodThatJustStartedIsLookedUp(t *testing.T) {
	s := newServer()
	// The watch has not heard of it.
	listed := []corev1.Pod{*newPod(Name{"shop", "web-1"}, "web", "n1", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending })}
	var started atomic.Bool
	var listErr error
	asked := 0
	s.PrependReactor("list", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
		if !started.Load() {
			return false, nil, nil
		}
		asked++
		if got := action.(clienttesting.ListAction).GetListRestrictions().Fields.String(); got != "spec.nodeName=n1" && got != "spec.nodeName=n2" || action.GetNamespace() != "shop" {
			t.Errorf("listed %q of %q", got, action.GetNamespace())
		}
		return true, &corev1.PodList{Items: listed}, listErr
	})
	c := newCluster(t, s.Clientset, nil)
	runs(t, c.Run)
	eventually(t, "pods are read", func() bool { return c.pods.ready() == nil })
	started.Store(true)
	web := spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "web"}
	if err := c.Authorize(t.Context(), istio.Caller{Node: "n1"}, web); err != nil || asked != 1 {
		t.Errorf("%v after %d lists", err, asked)
	}
	// A server that does not select, as this fake: the node is compared here as well.
	if err := c.Authorize(t.Context(), istio.Caller{Node: "n2"}, web); !isDenied(err) {
		t.Errorf("another node: %v", err)
	}
	listErr = errAway
	if err := c.Authorize(t.Context(), istio.Caller{Node: "n1"}, web); !errors.Is(err, errAway) || isDenied(err) {
		t.Errorf("API server away: %v", err)
	}
	listErr = nil
	before := asked
	var err error
	for range lookupBurst + 10 {
		err = c.Authorize(t.Context(), istio.Caller{Node: "n2"}, web)
	}
	if err == nil || isDenied(err) || asked-before > lookupBurst {
		t.Errorf("after too many: %v, %d lists", err, asked-before)
	}
	if err := c.Authorize(t.Context(), istio.Caller{Node: "n1"}, web); err != nil {
		t.Errorf("the other node: %v", err)
	}
}

func TestReadyWhileTheAPIServerAnswers(t *testing.T) {
	s := newServer()
	var mu sync.Mutex
	var down error
	s.PrependReactor("create", "selfsubjectreviews", func(clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		return true, &authenticationv1.SelfSubjectReview{}, down
	})
	c := newCluster(t, s.Clientset, nil)
	if err := c.Ready(); !errors.Is(err, errNoContact) || !errors.Is(err, errNotSynced) {
		t.Errorf("before Run: %v", err)
	}
	runs(t, c.Run)
	eventually(t, "ready", func() bool { return c.Ready() == nil })
	mu.Lock()
	down = errAway
	mu.Unlock()
	c.contact.ask(t.Context())
	if err := c.contact.check(time.Now()); err != nil {
		t.Errorf("one lost answer: %v", err)
	}
	if err := c.contact.check(time.Now().Add(contactPatience + time.Second)); !errors.Is(err, errAway) {
		t.Errorf("no answer for long: %v", err)
	}
}

func TestConfigNamesEveryComplaint(t *testing.T) {
	_, err := New(Config{})
	for _, want := range []string{"no client", "no trust domain", "no secret", "no configmap", "no audience", "no node agent"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	for _, bad := range []string{"", "a", "a/", "/a", "a/b/c"} {
		if _, err := ParseName(bad); err == nil {
			t.Errorf("%q is a name", bad)
		}
	}
}

func TestAClientThatIsRefusedSaysWhich(t *testing.T) {
	var log bytes.Buffer
	handle := logWatch(slog.New(slog.NewTextHandler(&log, nil)), "pods")
	handle(t.Context(), nil, errAway)
	if !strings.Contains(log.String(), "connection refused") || !strings.Contains(log.String(), "what=pods") {
		t.Errorf("log %q", &log)
	}
}

func FuzzReadClaims(f *testing.F) {
	f.Add("e30.eyJzdWIiOiJhIiwiZXhwIjoxfQ.x")
	f.Add(`e30.eyJzdWIiOiJhIiwiZXhwIjoxZTMwMCwiYXVkIjoiYSJ9.x`)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := readClaims(text)
		if err == nil && (c.Subject == "" || c.expires().Before(time.Unix(0, 0))) {
			t.Errorf("%+v", c)
		}
	})
}
