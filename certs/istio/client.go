package istio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// ClientConfig configures a Client.
type ClientConfig struct {
	Address    string // host:port of the service; required
	ServerName string // what its certificate must name; "": the host of Address
	RootFile   string // PEM roots of its certificate, or a directory with root-cert.pem, read anew at every handshake; required
	TokenFile  string // the bearer token, read anew at every call; required
	Cluster    string // the clusterid header; "": Kubernetes
}

func (c ClientConfig) withDefaults() ClientConfig {
	if c.ServerName == "" {
		c.ServerName, _, _ = net.SplitHostPort(c.Address) // Validate checked it
	}
	if c.Cluster == "" {
		c.Cluster = "Kubernetes" // istiod's own default
	}
	return c
}

// Validate joins every complaint about c.
func (c ClientConfig) Validate() error {
	var errs []error
	if _, _, err := net.SplitHostPort(c.Address); err != nil {
		errs = append(errs, fmt.Errorf("CA address: %w", err))
	}
	if c.RootFile == "" {
		errs = append(errs, errors.New("CA client: no file of roots to know the CA by"))
	}
	if c.TokenFile == "" {
		errs = append(errs, errors.New("CA client: no token file"))
	}
	return errors.Join(errs...)
}

// Client is a certs.Signer that asks a CA over the network.
type Client struct {
	cfg  ClientConfig
	conn *grpc.ClientConn
	api  security.IstioCertificateServiceClient
}

// NewClient makes a Client. It connects when it is first used, and again when it has to.
func NewClient(cfg ClientConfig) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg.withDefaults()}
	conn, err := grpc.NewClient(c.cfg.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(c.tls())),
		grpc.WithConnectParams(grpc.ConnectParams{
			// The Keeper has a back-off of its own; this one only keeps its calls apart.
			Backoff:           backoff.Config{BaseDelay: 250 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponseBytes)),
		grpc.WithDisableServiceConfig(), // DNS has no say in how certificates are asked for
		grpc.WithNoProxy(),              // nor has the environment
	)
	if err != nil {
		return nil, fmt.Errorf("CA %s: %w", cfg.Address, err)
	}
	c.conn, c.api = conn, security.NewIstioCertificateServiceClient(conn)
	return c, nil
}

// maxResponseBytes is room for a chain and a large bundle of roots.
const maxResponseBytes = 1 << 20

// Close ends the connection. It may be called again.
func (c *Client) Close() error {
	if err := c.conn.Close(); err != nil && status.Code(err) != codes.Canceled {
		return err
	}
	return nil
}

// tls verifies in VerifyConnection, where the roots can be read anew; crypto/tls itself would
// keep those of the start.
func (c *Client) tls() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		CurvePreferences:   []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		ServerName:         c.cfg.ServerName,
		InsecureSkipVerify: true,
		VerifyConnection:   c.verify,
	}
}

func (c *Client) verify(state tls.ConnectionState) error {
	name := c.cfg.RootFile
	if info, err := os.Stat(name); err == nil && info.IsDir() {
		name = filepath.Join(name, certs.OwnRootsFile)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("roots of the CA: %w", err)
	}
	roots, err := certs.ParseCertificates(data)
	if err != nil {
		return fmt.Errorf("roots of the CA: %s: %w", name, err)
	}
	pool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	for _, i := range state.PeerCertificates[1:] {
		intermediates.AddCert(i)
	}
	_, err = state.PeerCertificates[0].Verify(x509.VerifyOptions{
		DNSName:       c.cfg.ServerName,
		Roots:         pool,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("certificate of the CA: %w", err)
	}
	return nil
}

// Sign implements certs.Signer.
func (c *Client) Sign(ctx context.Context, id spiffe.ID, csrPEM []byte, ttl time.Duration) ([][]byte, error) {
	token, err := readToken(c.cfg.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("token for the CA: %w", err)
	}
	meta, err := structpb.NewStruct(map[string]any{impersonatedIdentity: id.String()})
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	ctx = metadata.AppendToOutgoingContext(ctx, authorizationHeader, bearerPrefix+token, clusterHeader, c.cfg.Cluster)
	reply, err := c.api.CreateCertificate(ctx, &security.IstioCertificateRequest{
		Csr:              string(csrPEM),
		ValidityDuration: int64(ttl / time.Second),
		Metadata:         meta,
	})
	if err != nil {
		return nil, c.explain(err)
	}
	chain := make([][]byte, len(reply.GetCertChain()))
	for i, element := range reply.GetCertChain() {
		chain[i] = []byte(element)
	}
	return chain, nil
}

// explain turns gRPC's words into an operator's.
func (c *Client) explain(err error) error {
	said := status.Convert(err)
	hint := ""
	switch said.Code() {
	case codes.Unavailable:
		hint = " (is it running, does a NetworkPolicy allow the port, does " + c.cfg.RootFile + " hold its root?)"
	case codes.DeadlineExceeded:
		hint = " (a NetworkPolicy may be dropping the port)"
	case codes.Unauthenticated:
		// istiod and istio-csr tell no more, whatever they refuse.
		hint = " (token file " + c.cfg.TokenFile + "; istiod and istio-csr must also name the agent's service account as a trusted node account)"
	case codes.Unimplemented:
		hint = " (it does not serve istio.v1.auth.IstioCertificateService)"
	}
	return &CallError{Code: said.Code(), text: fmt.Sprintf("CA %s: %s: %s%s", c.cfg.Address, said.Code(), said.Message(), hint), err: err}
}

// CallError is a failed call to the CA.
type CallError struct {
	Code codes.Code
	text string
	err  error
}

func (e *CallError) Error() string { return e.text }

func (e *CallError) Unwrap() error { return e.err }

func readToken(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", &fs.PathError{Op: "read", Path: path, Err: errors.New("the file is empty")}
	}
	return token, nil
}
