package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/cmd/raceway-ca/internal/kube"
)

func TestMain(m *testing.M) {
	if os.Getenv("RACEWAY_TEST_MAIN") != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

func TestReaderOfTheOutputMayEnd(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "--help")
	cmd.Env = append(os.Environ(), "RACEWAY_TEST_MAIN=1")
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Run(); err != nil {
		t.Errorf("with a closed pipe as output: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

const namespace = `apiVersion: v1
kind: Namespace
metadata: {name: shop}
`

const pod = `apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, uid: web-1}
spec: {nodeName: node-a, serviceAccountName: web, containers: []}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
`

func put(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func request(t *testing.T) []byte {
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

func TestServiceSignsForThePodsThatItSees(t *testing.T) {
	dir, cluster := t.TempDir(), t.TempDir()
	token := strings.Repeat("t", 40)
	put(t, filepath.Join(dir, "nodes.yaml"), "node-a: "+token+"\n")
	put(t, filepath.Join(dir, "token"), token)
	put(t, filepath.Join(cluster, "namespace.yaml"), namespace)

	cmd := command()
	out, in := io.Pipe()
	cmd.SetOut(in)
	cmd.SetErr(io.Discard)
	cmd.SetArgs([]string{
		"--listen=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--data-dir=" + filepath.Join(dir, "data"),
		"--cluster-dir=" + cluster, "--node-tokens=" + filepath.Join(dir, "nodes.yaml"),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		err := cmd.ExecuteContext(ctx)
		_ = in.CloseWithError(errors.Join(io.EOF, err))
		done <- err
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	text := make([]byte, 1024)
	n, err := out.Read(text)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, "data", ca.RootFile)
	address, found := strings.CutPrefix(string(text[:n]), "ready: certificate API on ")
	address, rest, _ := strings.Cut(address, ",")
	if !found || rest != " root certificate in "+root+"\n" {
		t.Fatalf("announced %q", text[:n])
	}
	client, err := istio.NewClient(istio.ClientConfig{Address: address, RootFile: root, TokenFile: filepath.Join(dir, "token")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	limit, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	web := spiffe.ID{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
	until := func(what string, is func(error) bool) {
		t.Helper()
		for {
			_, err := client.Sign(limit, web, request(t), 0)
			if is(err) {
				return
			}
			if limit.Err() != nil {
				t.Fatalf("%s: last answer %v", what, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	denied := func(err error) bool {
		var call *istio.CallError
		return errors.As(err, &call) && call.Code == codes.PermissionDenied && strings.Contains(err.Error(), "shop/web")
	}
	until("no pod yet", denied)
	put(t, filepath.Join(cluster, "pod.yaml"), pod)
	until("the pod is there", func(err error) bool { return err == nil })
	if err := os.Remove(filepath.Join(cluster, "pod.yaml")); err != nil {
		t.Fatal(err)
	}
	until("the pod is gone", denied)
}

func newAuthority(t *testing.T) *ca.Authority {
	t.Helper()
	source, err := ca.NewDir(t.TempDir(), ca.Root{TrustDomain: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = source.Close() })
	authority, err := ca.New(ca.Config{Source: source, TrustDomain: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	return authority
}

func TestMetricsAndProbes(t *testing.T) {
	m, err := newMetrics()
	if err != nil {
		t.Fatal(err)
	}
	ready := &readiness{}
	handler := m.handler(ready.check)
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	probe := func(when string, want int, text string) {
		t.Helper()
		if code, got := get("/readyz"); code != want || !strings.Contains(got, text) {
			t.Errorf("%s: %d %s", when, code, got)
		}
		if code, _ := get("/healthz"); code != http.StatusOK {
			t.Errorf("%s: the process is not alive: %d", when, code)
		}
	}
	probe("before there is an authority", http.StatusServiceUnavailable, "no credentials yet")
	ready.set(func() error { return errNoSnapshot })
	probe("before the cluster was read", http.StatusServiceUnavailable, "has not been read")
	ready.set(func() error { return nil })
	probe("ready", http.StatusOK, "ok")
	if err := m.watch(newAuthority(t)); err != nil {
		t.Fatal(err)
	}
	m.review(kube.ReviewCached, 0)
	m.review(kube.ReviewAccepted, 3*time.Millisecond)
	m.bundle(nil)
	m.bundle(errNoSnapshot)
	m.count(istio.Result{Outcome: istio.Signed})
	m.count(istio.Result{Outcome: istio.RefusedImpersonate})
	m.count(istio.Result{Outcome: istio.RefusedImpersonate})
	_, text := get("/metrics")
	for _, want := range []string{
		"\nraceway_ca_certificates_signed_total 1\n",
		"\nraceway_ca_requests_refused_total{cause=\"denied\"} 2\n",
		"\nraceway_ca_requests_refused_total{cause=\"unauthenticated\"} 0\n",
		"\nraceway_ca_signing_certificate_expiry_timestamp_seconds ",
		"\nraceway_ca_token_reviews_total{outcome=\"cached\"} 1\n",
		"\nraceway_ca_token_reviews_total{outcome=\"failed\"} 0\n",
		"\nraceway_ca_token_review_duration_seconds_count 1\n",
		"\nraceway_ca_bundle_checks_total{outcome=\"failed\"} 1\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %q", want)
		}
	}
	if problems, err := testutil.GatherAndLint(m.registry); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v %v", problems, err)
	}
}

func TestStartErrorsNameTheirCause(t *testing.T) {
	dir := t.TempDir()
	tokens := filepath.Join(dir, "nodes.yaml")
	put(t, tokens, "node-a: "+strings.Repeat("t", 40)+"\n")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	good := []string{"--listen=127.0.0.1:0", "--metrics-address=", "--data-dir=" + filepath.Join(dir, "data"), "--cluster-dir=" + dir, "--node-tokens=" + tokens}
	for _, tt := range []struct {
		name string
		args []string
		text string
	}{
		{"nothing set", []string{"--listen=:0", "--metrics-address="}, "neither --cluster-dir nor --kubeconfig is set"},
		{"a directory alone", []string{"--listen=:0", "--cluster-dir=" + dir}, "--node-tokens is not set\n--tls-name is not set"},
		{"two clusters", append(good, "--kubeconfig="+tokens), "both set"},
		{"no kubeconfig", []string{"--listen=:0", "--metrics-address=", "--kubeconfig=" + dir + "/gone"}, "gone"},
		{"no audience", []string{"--audience="}, "--audience is empty"},
		{"bad name of the secret", []string{"--secret=raceway-ca"}, "not NAMESPACE/NAME"},
		{"bad name of an agent", []string{"--node-agent=raceway-agent"}, "--node-agent: \"raceway-agent\""},
		{"no port", append(good, "--listen=localhost"), "--listen"},
		{"unspecified address without a name", append(good, "--listen=[::]:0"), "--tls-name"},
		{"no tokens", append(good, "--node-tokens="+dir+"/gone"), "gone"},
		{"bad trust domain", append(good, "--trust-domain=A"), "trust domain"},
		{"bad level", append(good, "--log-level=loud"), "loud"},
		{"address taken", append(good, "--listen="+taken.Addr().String()), "certificate API"},
		{"metrics address taken", append(good, "--metrics-address="+taken.Addr().String()), "metrics"},
		{"argument", append(good, "x"), "x"},
	} {
		cmd := command()
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		cmd.SetArgs(tt.args)
		if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.text)
		}
	}
}

func TestLogsNeverHoldTokens(t *testing.T) {
	dir := t.TempDir()
	token := strings.Repeat("s", 40)
	put(t, filepath.Join(dir, "nodes.yaml"), "node-a: "+token+"\n")
	var log bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cfg := config{listen: "127.0.0.1:0", files: fileConfig{dataDir: filepath.Join(dir, "data"), clusterDir: t.TempDir(), nodeTokens: filepath.Join(dir, "nodes.yaml")}, trustDomain: "cluster.local", tlsNames: []string{"localhost"}, ttl: time.Hour}
	if err := run(ctx, cfg, io.Discard, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))); err != nil {
		t.Error(err)
	}
	if log.Len() == 0 || strings.Contains(log.String(), token) {
		t.Errorf("log: %s", &log)
	}
}
