package interop

import (
	"context"
	"crypto/tls"
	"encoding/xml"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// notForCONNECT are h2spec's cases that ask for what an HBONE server does not have, each
// with the reason.
var notForCONNECT = map[string]string{
	"generic/2 Sends a WINDOW_UPDATE frame on half-closed (remote) stream":                                                                                 noBody,
	"generic/2 Sends a PRIORITY frame on half-closed (remote) stream":                                                                                      noBody,
	"http2/4.2 Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE":                                                                  "it sends what exceeds 16 KiB; ours is 1 MiB",
	"http2/5.1.2 Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded":                                                 closed,
	"http2/6.9.1 Sends multiple WINDOW_UPDATE frames increasing the flow control window to above 2^31-1 on a stream":                                       closed,
	"http2/8.1 Sends a second HEADERS frame without the END_STREAM flag":                                                                                   closed,
	"http2/8.1.2.1 Sends a HEADERS frame that contains a pseudo-header field as trailers":                                                                  closed,
	"http2/8.1.2.6 Sends a HEADERS frame with the \"content-length\" header field which does not equal the DATA frame payload length":                      closed,
	"http2/8.1.2.6 Sends a HEADERS frame with the \"content-length\" header field which does not equal the sum of the multiple DATA frames payload length": closed,
}

const (
	noBody = "it waits for a body, and the answer 400 has none"
	closed = "a request that is not CONNECT is answered and closed by its header alone, so nothing that follows is looked at"
)

// TestServerPassesH2spec runs h2spec against our transport. Its requests are GET and POST,
// which are answered 400; what it asks for is that frames and states are treated by the rules.
// h2spec shows no client certificate, so the connection is served without one.
func TestServerPassesH2spec(t *testing.T) {
	h2spec := peer(t, "RACEWAY_H2SPEC", "h2spec", "go install github.com/summerwind/h2spec/cmd/h2spec@latest")
	port := serveAnonymously(t, hbonetest.NewCA(t))
	report := filepath.Join(t.TempDir(), "report.xml")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, h2spec, "--host", "127.0.0.1", "--port", strconv.Itoa(port), "--tls", "--insecure",
		"--timeout", "2", "--junit-report", report, "http2", "hpack", "generic").CombinedOutput()
	if err != nil {
		t.Logf("h2spec: %v", err) // it exits 1 when a case fails; the report says which
	}
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("h2spec left no report: %v\n%s", err, out)
	}
	var suites struct {
		Suites []struct {
			Package string `xml:"package,attr"`
			Cases   []struct {
				Name    string  `xml:"classname,attr"`
				Failure *string `xml:"failure"`
				Error   *string `xml:"error"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(text, &suites); err != nil {
		t.Fatal(err)
	}
	cases := 0
	for _, suite := range suites.Suites {
		for _, c := range suite.Cases {
			cases++
			name := suite.Package + " " + c.Name
			failed := c.Failure != nil || c.Error != nil
			switch reason, known := notForCONNECT[name]; {
			case failed && !known && c.Failure != nil:
				t.Errorf("%q: %s", name, *c.Failure)
			case failed && !known:
				t.Errorf("%q: %s", name, *c.Error)
			case failed:
				t.Logf("%q does not apply: %s", name, reason)
			case known:
				t.Errorf("%q passes: it is no exception any more", name)
			}
		}
	}
	if cases < 100 {
		t.Errorf("h2spec ran %d cases only", cases)
	}
}

func serveAnonymously(t *testing.T, ca *hbonetest.CA) (port int) {
	t.Helper()
	cfg := ca.ServerTLS(t, hbonetest.ServerID)
	cfg.ClientAuth = tls.NoClientCert
	srv := hbone.NewServer(hbone.ServerConfig{TLS: cfg, Transport: h2.Server{}, Handler: func(r *hbone.ServerRequest) {
		if s, err := r.Accept(hbone.Response{}); err == nil {
			_, _ = io.Copy(io.Discard, s)
			_ = s.CloseWrite()
		}
	}})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = l.Close()
	})
	return l.Addr().(*net.TCPAddr).Port
}
