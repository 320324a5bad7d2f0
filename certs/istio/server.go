package istio

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	security "istio.io/api/security/v1alpha1"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Signer certifies. It is called only for what was authorized.
type Signer interface {
	// Sign returns a *ca.RequestError for what it will never sign.
	Sign(csrPEM []byte, id spiffe.ID, ttl time.Duration) (ca.Issued, error)
}

// Authorizer decides who may have whose certificate.
type Authorizer interface {
	// Authorize returns nil when caller may impersonate id. A *DeniedError's reason is told
	// to the caller, who may try again; any other error means that it cannot tell now.
	Authorize(ctx context.Context, caller Caller, id spiffe.ID) error
}

// DeniedError says why a caller is not known, or may not have a certificate.
type DeniedError struct{ Reason string }

func (e *DeniedError) Error() string { return e.Reason }

// Outcome classifies an answer; its text is a metric label.
type Outcome string

// Outcomes of a request.
const (
	Signed             Outcome = "signed"
	RefusedToken       Outcome = "unauthenticated"
	RefusedImpersonate Outcome = "denied"
	RefusedRequest     Outcome = "bad_request"
	RefusedRate        Outcome = "rate"
	RefusedUnavailable Outcome = "unavailable"
)

// Refusals lists every outcome but Signed.
func Refusals() []Outcome {
	return []Outcome{RefusedToken, RefusedImpersonate, RefusedRequest, RefusedRate, RefusedUnavailable}
}

// Result is one request and its answer.
type Result struct {
	Outcome  Outcome
	Caller   Caller    // zero when not authenticated
	Identity spiffe.ID // zero when it was not legible
	NotAfter time.Time // of the certificate, when signed
}

// ServerConfig configures a Server.
type ServerConfig struct {
	Signer        Signer        // required
	Authenticator Authenticator // required
	Authorizer    Authorizer    // required
	// GetCertificate gives the server's certificate; required.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

	RatePerCaller  float64       // requests per second, each; 0: 50
	BurstPerCaller int           // 0: 200, a full node's first start
	FailureRate    float64       // failed authentications per second from one address; 0: 1
	FailureBurst   int           // 0: 20
	MaxConnections int           // 0: 4096
	DrainTimeout   time.Duration // for calls in flight at the end; 0: 5 s
	// OnResult is told every answer, from many goroutines; nil: nobody is.
	OnResult func(Result)
	Log      *slog.Logger // nil: none
}

func (c ServerConfig) withDefaults() ServerConfig {
	if c.RatePerCaller == 0 {
		c.RatePerCaller = 50
	}
	if c.BurstPerCaller == 0 {
		c.BurstPerCaller = 200
	}
	if c.FailureRate == 0 {
		c.FailureRate = 1
	}
	if c.FailureBurst == 0 {
		c.FailureBurst = 20
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 4096
	}
	if c.DrainTimeout == 0 {
		c.DrainTimeout = 5 * time.Second
	}
	if c.OnResult == nil {
		c.OnResult = func(Result) {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate joins every complaint about c.
func (c ServerConfig) Validate() error {
	var errs []error
	for _, required := range []struct {
		missing bool
		what    string
	}{
		{c.Signer == nil, "signer"},
		{c.Authenticator == nil, "authenticator"},
		{c.Authorizer == nil, "authorizer"},
		{c.GetCertificate == nil, "serving certificate"},
	} {
		if required.missing {
			errs = append(errs, fmt.Errorf("certificate service: no %s", required.what))
		}
	}
	if c.RatePerCaller < 0 || c.BurstPerCaller < 0 || c.FailureRate < 0 || c.FailureBurst < 0 || c.MaxConnections < 0 || c.DrainTimeout < 0 {
		errs = append(errs, errors.New("certificate service: a limit is negative"))
	}
	return errors.Join(errs...)
}

// Server answers CreateCertificate.
type Server struct {
	security.UnimplementedIstioCertificateServiceServer

	cfg      ServerConfig
	callers  *limiters // of those who are known, by node
	failures *limiters // to authenticate, by address
}

// NewServer makes a Server; Serve makes it work.
func NewServer(cfg ServerConfig) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	return &Server{
		cfg:      cfg,
		callers:  newLimiters(cfg.RatePerCaller, cfg.BurstPerCaller),
		failures: newLimiters(cfg.FailureRate, cfg.FailureBurst),
	}, nil
}

// maxRequestBytes bounds a message: a request for a certificate is some 2 KiB.
const maxRequestBytes = 64 << 10

// Serve answers on l, which it closes, until ctx ends and calls in flight have had their
// time.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	server := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{
			MinVersion:       tls.VersionTLS13,
			CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
			GetCertificate:   s.cfg.GetCertificate,
		})),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(100),
		grpc.ConnectionTimeout(10*time.Second),
		// A connection ends now and then, so that callers spread over replicas again.
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: 15 * time.Minute, MaxConnectionAge: time.Hour, MaxConnectionAgeGrace: time.Minute,
			Time: 30 * time.Second, Timeout: 10 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	security.RegisterIstioCertificateServiceServer(server, s)
	served := make(chan error, 1)
	go func() { served <- server.Serve(netutil.LimitListener(l, s.cfg.MaxConnections)) }()
	select {
	case err := <-served:
		server.Stop()
		return fmt.Errorf("serve certificate requests: %w", err)
	case <-ctx.Done():
	}
	force := time.AfterFunc(s.cfg.DrainTimeout, server.Stop)
	server.GracefulStop()
	force.Stop()
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve certificate requests: %w", err)
	}
	return nil
}

// CreateCertificate implements the service.
func (s *Server) CreateCertificate(ctx context.Context, r *security.IstioCertificateRequest) (*security.IstioCertificateResponse, error) {
	result, chain, err := s.answer(ctx, r)
	s.cfg.OnResult(result)
	if err != nil {
		s.cfg.Log.Warn("certificate refused", "node", result.Caller.Node, "agent", result.Caller.Pod, "identity", result.Identity.String(), "remote", remoteHost(ctx), "cause", string(result.Outcome), "error", status.Convert(err).Message())
		return nil, err
	}
	return &security.IstioCertificateResponse{CertChain: chain}, nil
}

func (s *Server) answer(ctx context.Context, r *security.IstioCertificateRequest) (Result, []string, error) {
	result := Result{}
	refuse := func(outcome Outcome, code codes.Code, format string, args ...any) (Result, []string, error) {
		result.Outcome = outcome
		return result, nil, status.Errorf(code, format, args...)
	}
	failures := s.failures.get(remoteHost(ctx))
	if failures.Tokens() < 1 { // who guesses shall not keep the authenticator busy
		return refuse(RefusedRate, codes.ResourceExhausted, "too many calls from this address with a token that is not accepted")
	}
	token, err := bearerToken(ctx)
	if err != nil {
		failures.Allow()
		return refuse(RefusedToken, codes.Unauthenticated, "%v", err)
	}
	caller, err := s.cfg.Authenticator.Authenticate(ctx, token)
	var denied *DeniedError
	switch {
	case errors.As(err, &denied):
		failures.Allow()
		return refuse(RefusedToken, codes.Unauthenticated, "%s", denied.Reason)
	case err != nil:
		return refuse(RefusedUnavailable, codes.Unavailable, "%v", err)
	}
	result.Caller = caller
	if !s.callers.get(caller.Node).Allow() {
		return refuse(RefusedRate, codes.ResourceExhausted, "%s asks for more than %g certificates a second", caller, s.cfg.RatePerCaller)
	}
	id, err := requestedIdentity(r)
	if err != nil {
		return refuse(RefusedRequest, codes.InvalidArgument, "%v", err)
	}
	result.Identity = id
	switch err := s.cfg.Authorizer.Authorize(ctx, caller, id); {
	case errors.As(err, &denied):
		return refuse(RefusedImpersonate, codes.PermissionDenied, "%s may not have a certificate for %s: %s", caller, id, denied.Reason)
	case err != nil:
		return refuse(RefusedUnavailable, codes.Unavailable, "authorize %s for %s: %v", caller, id, err)
	}
	// More seconds than a Duration holds are as good as the longest one.
	ttl := time.Duration(min(r.GetValidityDuration(), int64(math.MaxInt64/time.Second))) * time.Second
	issued, err := s.cfg.Signer.Sign([]byte(r.GetCsr()), id, ttl)
	var bad *ca.RequestError
	switch {
	case errors.As(err, &bad):
		return refuse(RefusedRequest, codes.InvalidArgument, "%v", bad)
	case err != nil:
		return refuse(RefusedUnavailable, codes.Unavailable, "%v", err)
	}
	result.Outcome, result.NotAfter = Signed, issued.NotAfter
	chain := make([]string, len(issued.Chain))
	for i, c := range issued.Chain {
		chain[i] = string(c)
	}
	s.cfg.Log.Info("certificate signed", "node", caller.Node, "agent", caller.Pod, "identity", id.String(), "serial", issued.Serial, "notAfter", issued.NotAfter)
	return result, chain, nil
}

func requestedIdentity(r *security.IstioCertificateRequest) (spiffe.ID, error) {
	value, ok := r.GetMetadata().GetFields()[impersonatedIdentity]
	if !ok {
		return spiffe.ID{}, fmt.Errorf("no %s in the metadata: a node has no identity of its own", impersonatedIdentity)
	}
	id, err := spiffe.Parse(value.GetStringValue())
	if err != nil {
		return spiffe.ID{}, fmt.Errorf("%s: %w", impersonatedIdentity, err)
	}
	return id, nil
}
