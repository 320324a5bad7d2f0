package istio

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const td = "cluster.local"

var (
	web = spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "web"}
	db  = spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "db"}

	tokenA = strings.Repeat("a", minTokenLength)
	tokenB = strings.Repeat("b", minTokenLength)
)

// grants is an Authorizer that lets each node have what its list says.
type grants map[string][]spiffe.ID

func (g grants) Authorize(_ context.Context, caller Caller, id spiffe.ID) error {
	for _, granted := range g[caller.Node] {
		if granted == id {
			return nil
		}
	}
	return &DeniedError{Reason: "no such pod on it"}
}

type blind struct{}

func (blind) Authorize(context.Context, Caller, spiffe.ID) error {
	return errors.New("no view of the cluster")
}

// service is a Server on loopback with its files.
type service struct {
	address, rootFile, tokenFile, nodesFile string
	authority                               *ca.Authority

	mu      sync.Mutex
	results []Result
}

func (s *service) outcomes() []Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Result(nil), s.results...)
}

func put(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name+".tmp", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".tmp", name); err != nil {
		t.Fatal(err)
	}
}

// runs runs f until the test ends.
func runs(t *testing.T, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func authorityIn(t *testing.T, dir string) *ca.Authority {
	t.Helper()
	source, err := ca.NewDir(dir, ca.Root{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = source.Close() })
	authority, err := ca.New(ca.Config{Source: source, TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	return authority
}

func start(t *testing.T, edit func(*ServerConfig)) *service {
	t.Helper()
	dir := t.TempDir()
	s := &service{tokenFile: filepath.Join(dir, "token"), nodesFile: filepath.Join(dir, "nodes.yaml"), rootFile: filepath.Join(dir, "ca", ca.RootFile)}
	put(t, s.tokenFile, tokenA+"\n")
	put(t, s.nodesFile, "node-a: "+tokenA+"\nnode-b: "+tokenB+"\n")
	s.authority = authorityIn(t, filepath.Dir(s.rootFile))
	tokens, err := NewNodeTokens(s.nodesFile, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tokens.Close() })
	runs(t, tokens.Run)
	serving, err := s.authority.Serving([]string{"127.0.0.1", "ca.example"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := ServerConfig{
		Signer: s.authority, Authenticator: tokens, Authorizer: grants{"node-a": {web}, "node-b": {db}}, GetCertificate: serving.GetCertificate,
		OnResult: func(r Result) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.results = append(s.results, r)
		},
	}
	if edit != nil {
		edit(&cfg)
	}
	server, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	runs(t, func(ctx context.Context) error { return server.Serve(ctx, l) })
	return s
}

func (s *service) client(t *testing.T, edit func(*ClientConfig)) *Client {
	t.Helper()
	cfg := ClientConfig{Address: s.address, RootFile: s.rootFile, TokenFile: s.tokenFile}
	if edit != nil {
		edit(&cfg)
	}
	c, err := NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func csr(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func limit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestKeeperGetsItsCertificateFromTheService(t *testing.T) {
	s := start(t, nil)
	roots, err := certs.NewFileRoots(s.rootFile, td, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = roots.Close() }()
	keeper, err := certs.New(certs.Config{Signer: s.client(t, nil), Roots: roots, TrustDomain: td, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	stop := runs(t, keeper.Run)
	defer stop()
	keeper.Want(web)
	if err := keeper.Ready(limit(t), web); err != nil {
		t.Fatal(err)
	}
	status := keeper.Status()[0]
	if status.State != certs.StateValid || time.Until(status.NotAfter) > time.Hour {
		t.Errorf("status %+v", status)
	}
	keeper.Want(db) // runs on another node
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := keeper.Ready(ctx, db); err == nil || !strings.Contains(err.Error(), "node node-a may not have a certificate for "+db.String()+": no such pod on it") {
		t.Errorf("identity of another node: %v", err)
	}
}

func TestOutcomesAreTold(t *testing.T) {
	s := start(t, nil)
	c := s.client(t, nil)
	if _, err := c.Sign(limit(t), web, csr(t), time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Sign(limit(t), db, csr(t), time.Hour); err == nil {
		t.Fatal("signed for another node's pod")
	}
	got := s.outcomes()
	if len(got) != 2 || got[0].Outcome != Signed || got[0].Caller.Node != "node-a" || got[0].Identity != web || got[0].NotAfter.IsZero() ||
		got[1].Outcome != RefusedImpersonate || got[1].Identity != db || !got[1].NotAfter.IsZero() {
		t.Errorf("told %+v", got)
	}
}

// call speaks to the service without our Client.
func (s *service) call(t *testing.T, headers []string, r *security.IstioCertificateRequest) error {
	t.Helper()
	conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx := metadata.AppendToOutgoingContext(limit(t), headers...)
	_, err = security.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, r)
	return err
}

func TestRefusalsOnTheWire(t *testing.T) {
	s := start(t, func(c *ServerConfig) { c.FailureBurst = 1000 })
	impersonate := func(v any) *structpb.Struct {
		m, err := structpb.NewStruct(map[string]any{impersonatedIdentity: v})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	auth := func(v string) []string { return []string{"authorization", v} }
	valid := func(edit func(*security.IstioCertificateRequest)) *security.IstioCertificateRequest {
		r := &security.IstioCertificateRequest{Csr: string(csr(t)), ValidityDuration: 3600, Metadata: impersonate(web.String())}
		if edit != nil {
			edit(r)
		}
		return r
	}
	for _, tt := range []struct {
		name    string
		headers []string
		edit    func(*security.IstioCertificateRequest)
		code    codes.Code
		text    string
	}{
		{"granted", auth("Bearer " + tokenA), nil, codes.OK, ""},
		{"scheme in another case", auth("bearer " + tokenA), nil, codes.OK, ""},
		{"longest lifetime", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.ValidityDuration = math.MaxInt64 }, codes.OK, ""},
		{"negative lifetime", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.ValidityDuration = math.MinInt64 }, codes.OK, ""},
		{"no token", nil, nil, codes.Unauthenticated, "0 authorization headers"},
		{"two tokens", append(auth("Bearer "+tokenA), auth("Bearer "+tokenB)...), nil, codes.Unauthenticated, "2 authorization headers"},
		{"no bearer token", auth("Basic " + tokenA), nil, codes.Unauthenticated, "not a bearer token"},
		{"scheme alone", auth("Bearer"), nil, codes.Unauthenticated, "not a bearer token"},
		{"empty token", auth("Bearer "), nil, codes.Unauthenticated, ""},
		{"unknown token", auth("Bearer " + strings.Repeat("c", 32)), nil, codes.Unauthenticated, "belongs to no node"},
		{"prefix of a token", auth("Bearer " + tokenA[1:]), nil, codes.Unauthenticated, "belongs to no node"},
		{"another node's token", auth("Bearer " + tokenB), nil, codes.PermissionDenied, "node node-b may not have a certificate for " + web.String()},
		{"another node's identity", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.Metadata = impersonate(db.String()) }, codes.PermissionDenied, db.String()},
		{"no identity", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.Metadata = nil }, codes.InvalidArgument, "no ImpersonatedIdentity"},
		{"identity that is no text", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.Metadata = impersonate(1) }, codes.InvalidArgument, "ImpersonatedIdentity"},
		{"malformed identity", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.Metadata = impersonate(web.String() + "/../x") }, codes.InvalidArgument, "ImpersonatedIdentity"},
		{"no request", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.Csr = "" }, codes.InvalidArgument, "not PEM"},
		{"huge request", auth("Bearer " + tokenA), func(r *security.IstioCertificateRequest) { r.Csr = strings.Repeat("x", 1<<20) }, codes.ResourceExhausted, "larger than max"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := s.call(t, tt.headers, valid(tt.edit))
			if status.Code(err) != tt.code || !strings.Contains(status.Convert(err).Message(), tt.text) {
				t.Errorf("%v, want %s with %q", err, tt.code, tt.text)
			}
			if err != nil && (strings.Contains(err.Error(), tokenA) || strings.Contains(err.Error(), tokenB)) {
				t.Errorf("the error tells a token: %v", err)
			}
		})
	}
}

func TestForeignTrustDomainIsRefusedEvenIfGranted(t *testing.T) {
	far := spiffe.ID{TrustDomain: "far.example", Namespace: "shop", ServiceAccount: "web"}
	s := start(t, func(c *ServerConfig) { c.Authorizer = grants{"node-a": {far}} })
	if _, err := s.client(t, nil).Sign(limit(t), far, csr(t), 0); code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

// mute is an Authenticator that cannot tell.
type mute struct{}

func (mute) Authenticate(context.Context, string) (Caller, error) {
	return Caller{}, errors.New("no answer from the reviewer")
}

func TestAuthenticatorThatCannotTellIsUnavailable(t *testing.T) {
	s := start(t, func(c *ServerConfig) { c.Authenticator, c.FailureBurst = mute{}, 1 })
	for range 3 { // which is nobody's fault, so it is not counted as a guess
		if _, err := s.client(t, nil).Sign(limit(t), web, csr(t), 0); code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no answer from the reviewer") {
			t.Error(err)
		}
	}
}

func TestGuessesOfOneAddressAreLimited(t *testing.T) {
	s := start(t, func(c *ServerConfig) { c.FailureRate, c.FailureBurst = 0.001, 2 })
	wrong := filepath.Join(t.TempDir(), "token")
	put(t, wrong, strings.Repeat("w", 40))
	guess := s.client(t, func(c *ClientConfig) { c.TokenFile = wrong })
	for want := range 3 {
		_, err := guess.Sign(limit(t), web, csr(t), 0)
		if limited := code(err) == codes.ResourceExhausted; limited != (want == 2) {
			t.Errorf("guess %d: %v", want, err)
		}
	}
	got := s.outcomes()
	if last := got[len(got)-1]; last.Outcome != RefusedRate || last.Caller != (Caller{}) {
		t.Errorf("told %+v", last)
	}
}

func TestLimitersThatLimitNothingAreLetGo(t *testing.T) {
	l := newLimiters(0.001, 2)
	for range 2 {
		l.get("busy").Allow()
	}
	for i := range maxLimiters {
		l.get(strconv.Itoa(i))
	}
	if len(l.byKey) > 3 || l.get("busy").Allow() {
		t.Errorf("%d are kept, or the busy one was forgotten", len(l.byKey))
	}
}

func code(err error) codes.Code {
	var call *CallError
	if errors.As(err, &call) {
		return call.Code
	}
	return codes.OK
}

func TestAuthorizerThatCannotTellIsUnavailable(t *testing.T) {
	s := start(t, func(c *ServerConfig) { c.Authorizer = blind{} })
	if _, err := s.client(t, nil).Sign(limit(t), web, csr(t), 0); code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no view of the cluster") {
		t.Error(err)
	}
}

func TestEachCallerHasItsOwnRate(t *testing.T) {
	s := start(t, func(c *ServerConfig) { c.RatePerCaller, c.BurstPerCaller = 0.001, 2 })
	a := s.client(t, nil)
	for range 2 {
		if _, err := a.Sign(limit(t), web, csr(t), 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Sign(limit(t), web, csr(t), 0); code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "node-a") {
		t.Errorf("third request: %v", err)
	}
	b := filepath.Join(t.TempDir(), "token")
	put(t, b, tokenB)
	if _, err := s.client(t, func(c *ClientConfig) { c.TokenFile = b }).Sign(limit(t), db, csr(t), 0); err != nil {
		t.Errorf("the other node: %v", err)
	}
}

func TestTokensAreReadAnew(t *testing.T) {
	s := start(t, func(c *ServerConfig) { c.FailureBurst = 1000 })
	c := s.client(t, nil)
	if _, err := c.Sign(limit(t), web, csr(t), 0); err != nil {
		t.Fatal(err)
	}
	fresh := strings.Repeat("n", 40)
	put(t, s.nodesFile, "node-a: "+fresh+"\n")
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := c.Sign(limit(t), web, csr(t), 0); code(err) == codes.Unauthenticated {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the old token is still accepted")
		}
	}
	put(t, s.tokenFile, fresh)
	if _, err := c.Sign(limit(t), web, csr(t), 0); err != nil {
		t.Errorf("with the new token on the same connection: %v", err)
	}
	put(t, s.nodesFile, "node-a: short\n") // refused: the last good ones stay
	time.Sleep(200 * time.Millisecond)
	if _, err := c.Sign(limit(t), web, csr(t), 0); err != nil {
		t.Errorf("after a damaged file: %v", err)
	}
	put(t, s.tokenFile, "\n")
	if _, err := c.Sign(limit(t), web, csr(t), 0); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("empty token file: %v", err)
	}
}

func TestClientKnowsItsCA(t *testing.T) {
	s := start(t, nil)
	other := authorityIn(t, t.TempDir())
	alien := filepath.Join(t.TempDir(), "root.pem")
	put(t, alien, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Roots()[0].Raw})))
	good, err := os.ReadFile(s.rootFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(*ClientConfig)
		text string
	}{
		{"by IP address", nil, ""},
		{"by a directory of roots", func(c *ClientConfig) { c.RootFile = filepath.Dir(s.rootFile) }, ""},
		{"by name", func(c *ClientConfig) { c.ServerName = "ca.example" }, ""},
		{"another name", func(c *ClientConfig) { c.ServerName = "other.example" }, "ca.example"},
		{"another root", func(c *ClientConfig) { c.RootFile = alien }, "unknown authority"},
		{"no root file", func(c *ClientConfig) { c.RootFile = alien + ".gone" }, "no such file"},
		{"nobody there", func(c *ClientConfig) { c.Address = closedPort(t) }, "is it running"},
		{"no token file", func(c *ClientConfig) { c.TokenFile = alien + ".gone" }, "token for the CA"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := s.client(t, tt.edit).Sign(limit(t), web, csr(t), 0)
			if tt.text == "" && err != nil || tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("%v, want %q", err, tt.text)
			}
		})
	}
	t.Run("roots that come later", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "root.pem")
		c := s.client(t, func(c *ClientConfig) { c.RootFile = file })
		if _, err := c.Sign(limit(t), web, csr(t), 0); code(err) != codes.Unavailable {
			t.Fatalf("without roots: %v", err)
		}
		put(t, file, string(good))
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			_, err := c.Sign(limit(t), web, csr(t), 0)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	})
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func TestSilentServiceRunsIntoTheCallersDeadline(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // accepts in the kernel, says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	s := start(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = s.client(t, func(c *ClientConfig) { c.Address = l.Addr().String() }).Sign(ctx, web, csr(t), 0)
	if code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "NetworkPolicy") {
		t.Error(err)
	}
}

func TestTokenFiles(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		name, text string
		mode       os.FileMode
		want       string // part of the error; "" is accepted
	}{
		{name: "two nodes", text: "a: " + tokenA + "\nb: '" + tokenB + "'\n"},
		{name: "group may read", text: "a: " + tokenA, mode: 0o640},
		{name: "only digits", text: "a: " + strings.Repeat("1", 40)},
		{name: "empty: nobody may call", text: ""},
		{name: "everyone may read", text: "a: " + tokenA, mode: 0o644, want: "chmod 600"},
		{name: "short", text: "a: " + tokenA[1:], want: "token of node a is shorter than 32"},
		{name: "no token", text: "a:", want: "shorter than 32"},
		{name: "shared", text: "a: " + tokenA + "\nb: " + tokenA, want: "nodes a and b have the same token"},
		{name: "a node twice", text: "a: " + tokenA + "\na: " + tokenB, want: "each once"},
		{name: "a list", text: "- " + tokenA, want: "not a YAML mapping"},
		{name: "nameless", text: "'': " + tokenA, want: "has no node"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := filepath.Join(dir, strings.ReplaceAll(tt.name, " ", "-"))
			put(t, name, tt.text)
			if tt.mode != 0 {
				if err := os.Chmod(name, tt.mode); err != nil {
					t.Fatal(err)
				}
			}
			tokens, err := readTokens(name)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%d tokens, %v, want an error with %q", len(tokens), err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), tokenA) {
				t.Errorf("the error tells the token: %v", err)
			}
		})
	}
	if _, err := NewNodeTokens(filepath.Join(dir, "gone"), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a missing file was accepted")
	}
}

func FuzzParseTokens(f *testing.F) {
	f.Add([]byte("a: " + tokenA))
	f.Add([]byte("a: &x " + tokenA + "\nb: *x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		tokens, err := parseTokens(data)
		if err != nil && len(tokens) > 0 {
			t.Fatalf("%d tokens beside %v", len(tokens), err)
		}
	})
}

func TestConfigsNameEveryComplaint(t *testing.T) {
	err := errors.Join(ServerConfig{MaxConnections: -1}.Validate(), ClientConfig{}.Validate())
	for _, want := range []string{"no signer", "no authenticator", "no authorizer", "no serving certificate", "negative", "CA address", "no file of roots", "no token file"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
}
