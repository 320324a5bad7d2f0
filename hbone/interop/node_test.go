package interop

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// certificates writes what a peer needs to a directory.
func certificates(t *testing.T, ca *hbonetest.CA, cert tls.Certificate) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"root.pem": ca.PEM(), "cert.pem": hbonetest.CertPEM(cert), "key.pem": hbonetest.KeyPEM(t, cert),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// nodeTunnel is the standard input and output of a node that runs client.mjs.
type nodeTunnel struct {
	io.Reader
	io.WriteCloser
}

func (n nodeTunnel) CloseWrite() error { return n.Close() }

func startNodeClient(t *testing.T, s *server, target string, cert tls.Certificate) (tunnel nodeTunnel, wait func() (status int, stderr string)) {
	t.Helper()
	node := peer(t, "RACEWAY_NODE", "node", "install Node.js")
	cmd := exec.Command(node, "testdata/client.mjs", strconv.Itoa(int(s.addr.Port())), target, certificates(t, s.ca, cert))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // when it still runs
	return nodeTunnel{out, in}, func() (int, string) {
		_ = cmd.Wait() // the exit status says it
		return cmd.ProcessState.ExitCode(), stderr.String()
	}
}

func TestNodeAsClient(t *testing.T) {
	ca := hbonetest.NewCA(t)
	s := startServer(t, ca)
	tunnel, wait := startNodeClient(t, s, application, ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ClientID}}))
	exchange(t, tunnel, 16<<20)
	if status, stderr := wait(); status != 0 {
		t.Errorf("node exits %d: %s", status, stderr)
	}
}

func TestNodeAsClientIsRejected(t *testing.T) {
	ca := hbonetest.NewCA(t)
	s := startServer(t, ca)
	for name, test := range map[string]struct {
		target, id, want string
	}{
		"another target":   {"127.0.0.2:7000", hbonetest.ClientID, "status 400"},
		"our own syntax":   {"127.0.0.1:0", hbonetest.ClientID, "status 400"},
		"another identity": {application, "spiffe://cluster.local/ns/demo/sa/other", "status 401"},
	} {
		t.Run(name, func(t *testing.T) {
			_, wait := startNodeClient(t, s, test.target, ca.Issue(t, hbonetest.Leaf{IDs: []string{test.id}}))
			if status, stderr := wait(); status != 2 || strings.TrimSpace(stderr) != test.want {
				t.Errorf("node exits %d: %s; want %s", status, stderr, test.want)
			}
		})
	}
}

func startNodeServer(t *testing.T, ca *hbonetest.CA) hbone.Key {
	t.Helper()
	node := peer(t, "RACEWAY_NODE", "node", "install Node.js")
	cmd := exec.Command(node, "testdata/server.mjs", application, certificates(t, ca, ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ServerID}})))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("node prints no port: %v", err)
	}
	return hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: netip.MustParseAddrPort("127.0.0.1:" + strings.TrimSpace(line))}
}

func TestNodeAsServer(t *testing.T) {
	ca := hbonetest.NewCA(t)
	key := startNodeServer(t, ca)
	client := newClient(t, ca)
	for range 3 {
		tunnel, err := client.Open(t.Context(), key, &hbone.Request{Authority: application})
		if err != nil {
			t.Fatal(err)
		}
		if tunnel.Response.Baggage.Service != "node" {
			t.Errorf("response baggage = %+v", tunnel.Response.Baggage)
		}
		exchange(t, tunnel, 8<<20)
		_ = tunnel.Close()
	}
	_, err := client.Open(t.Context(), key, &hbone.Request{Authority: "127.0.0.2:7000"})
	var se *hbone.StatusError
	if !errors.As(err, &se) || se.Status != 503 {
		t.Errorf("Open = %v, want status 503", err)
	}
	other := key
	other.Peer = "spiffe://cluster.local/ns/demo/sa/other"
	wantTLSError(t, client, other, hbone.TLSWrongIdentity)
}
