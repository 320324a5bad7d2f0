package lab_test

import (
	"crypto/rand"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

func capture(t *testing.T, l *lab.Lab, node int) *lab.Capture {
	t.Helper()
	c, err := l.Capture(t.Context(), l.Node(node))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func contains(t *testing.T, c *lab.Capture, needle []byte) bool {
	t.Helper()
	found, err := c.Contains(t.Context(), needle)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func countPort(t *testing.T, c *lab.Capture, port uint16) int {
	t.Helper()
	n, err := c.CountPort(t.Context(), port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func dropped(t *testing.T, c *lab.Capture) uint64 {
	t.Helper()
	n, err := c.Dropped(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestCaptureSeesWhatCrossesTheLinkAndNothingElse(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := labtest.New(t, f.opts)
			server, near, far := addPod(t, l, "server", 1), addPod(t, l, "near", 1), addPod(t, l, "far", 2)
			serveEcho(t, server.Host)
			links := []*lab.Capture{capture(t, l, 1), capture(t, l, 2)}
			for _, a := range server.Addrs {
				local, remote := nonce(), nonce()
				ask(t, near.Host, netip.AddrPortFrom(a, 7), local)
				ask(t, far.Host, netip.AddrPortFrom(a, 7), remote)
				for i, c := range links {
					if contains(t, c, local) {
						t.Errorf("link %d carried what stayed on the node", i+1)
					}
					if !contains(t, c, remote) {
						t.Errorf("link %d did not carry what went to the other node", i+1)
					}
					if n := countPort(t, c, 7); n < 6 { // handshake, data both ways, two FINs
						t.Errorf("link %d carried %d packets of port 7", i+1, n)
					}
					if n := countPort(t, c, 15008); n != 0 {
						t.Errorf("link %d carried %d packets of port 15008", i+1, n)
					}
					if n := dropped(t, c); n != 0 {
						t.Errorf("%d packets were dropped", n)
					}
					if err := c.Reset(t.Context()); err != nil {
						t.Fatal(err)
					}
					if contains(t, c, remote) || countPort(t, c, 7) != 0 {
						t.Error("Reset left packets")
					}
				}
			}
		})
	}
}

// A capture that misses packets under load proves no absence, so every byte is accounted for.
func TestCaptureKeepsUpWithBulkTraffic(t *testing.T) {
	const size = 128 << 20
	l := labtest.New(t, lab.Options{})
	server, client := addPod(t, l, "server", 1), addPod(t, l, "client", 2)
	c := capture(t, l, 1)
	listener, err := server.Listen(9)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	received := make(chan int64)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			close(received)
			return
		}
		n, _ := io.Copy(io.Discard, conn) // the count tells whether it was all
		_ = conn.Close()
		received <- n
	}()
	conn, err := client.Dial(t.Context(), server.AddrPort(9))
	if err != nil {
		t.Fatal(err)
	}
	chunk := make([]byte, 1<<20)
	_, _ = rand.Read(chunk)
	var last []byte
	for range size / len(chunk) {
		last = nonce()
		copy(chunk, last)
		if _, err := conn.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if n := <-received; n != size {
		t.Fatalf("received %d bytes of %d", n, size)
	}
	if n := dropped(t, c); n != 0 {
		t.Fatalf("%d packets were dropped", n)
	}
	if _, n, err := c.Totals(t.Context()); err != nil || n < size {
		t.Errorf("captured %d bytes, %v, of a transfer of %d", n, err, size)
	}
}

func TestCaptureIsReadableByTcpdump(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	server, client := addPod(t, l, "server", 1), addPod(t, l, "client", 2)
	serveEcho(t, server.Host)
	c := capture(t, l, 1)
	ask(t, client.Host, server.AddrPort(7), []byte("hello"))
	file := filepath.Join(t.TempDir(), "link.pcap")
	if err := c.WritePCAP(t.Context(), file); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("tcpdump"); err != nil && os.Getenv("RACEWAY_REQUIRE_ROOT") != "1" {
		t.Skip("needs tcpdump")
	}
	// -Z root: otherwise it drops privileges and cannot read our temporary directory.
	output, err := exec.Command("tcpdump", "-Z", "root", "-nr", file, "tcp and dst port 7 and dst host "+server.Addr().String()).CombinedOutput()
	if err != nil || len(output) == 0 {
		t.Errorf("tcpdump: %v: %s", err, output)
	}
}

func TestCaptureOfAMissingLinkNamesIt(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	if c, err := l.Fabric().Capture(t.Context(), "node9"); err == nil {
		t.Errorf("captured %v", c)
	}
}

func TestAClosedCaptureAnswersWithAnError(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	c := capture(t, l, 1)
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	start := time.Now()
	if _, err := c.Contains(t.Context(), []byte("x")); err == nil {
		t.Error("a closed capture still answers")
	}
	if time.Since(start) > 10*time.Second {
		t.Error("a closed capture waits for a marker that cannot come")
	}
}

func TestDialFailuresComeFromTheNamespace(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	p := addPod(t, l, "web", 1)
	if conn, err := p.Dial(t.Context(), p.AddrPort(7)); err == nil {
		t.Errorf("connected to a closed port: %v", conn.RemoteAddr())
	}
	// A cluster IP has no route on a node without kube-proxy: an error at once, no hanging.
	s, err := l.AddService(lab.ServiceSpec{Namespace: "shop", Name: "web", Ports: []lab.ServicePort{{Port: 80}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Dial(t.Context(), netip.AddrPortFrom(s.VIPs[0], 80)); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("dialling a cluster IP without kube-proxy: %v, want network unreachable", err)
	}
}
