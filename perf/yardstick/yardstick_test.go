package yardstick

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"go.uber.org/goleak"
)

// The test's binary is also a Go relay.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "relay" {
		if err := Relay(context.Background(), os.Args[2:]); err != nil {
			panic(err)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// freePort is an address that was free a moment ago.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// startEcho answers with what it reads until the end, and then ends too.
func startEcho(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				_, _ = io.Copy(conn, conn) // the client sees what is missing
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// start runs both relays of a pair in front of an echo.
func start(t *testing.T, pair Pair) (Path, string) {
	t.Helper()
	dir := t.TempDir()
	if err := WriteCredentials(dir); err != nil {
		t.Fatal(err)
	}
	path := Path{Entry: freePort(t), Link: freePort(t), Application: startEcho(t)}
	for _, side := range []Side{ServerSide, ClientSide} {
		cmd, err := pair.Command(dir, side, path)
		if err != nil {
			t.Fatal(err)
		}
		run(t, cmd, side)
		listen, _ := path.hop(side)
		awaitListener(t, listen)
	}
	return path, dir
}

// run has a relay's command run until the test ends.
func run(t *testing.T, cmd *exec.Cmd, side Side) {
	t.Helper()
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		if t.Failed() {
			t.Logf("%s: %s", side, output.Bytes())
		}
	})
}

// startQUIC runs both relays of UDP in front of an echo, until something comes back through them.
func startQUIC(t *testing.T) (path Path, dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := WriteCredentials(dir); err != nil {
		t.Fatal(err)
	}
	echo, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buffer := make([]byte, maxPayload)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(buffer)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(buffer[:n], from)
		}
	}()
	t.Cleanup(func() {
		_ = echo.Close()
		<-ended
	})
	path = Path{Entry: freePort(t), Link: freePort(t), Application: echo.LocalAddr().(*net.UDPAddr).AddrPort()}
	for _, side := range []Side{ServerSide, ClientSide} {
		cmd, err := QUICRelay{Program: []string{os.Args[0], "relay"}}.Command(dir, side, path)
		if err != nil {
			t.Fatal(err)
		}
		run(t, cmd, side)
	}
	socket := dialUDP(t, path.Entry)
	for deadline := time.Now().Add(20 * time.Second); !answers(socket, "ready"); {
		if time.Now().After(deadline) {
			t.Fatal("nothing comes back through the relays")
		}
	}
	return path, dir
}

func dialUDP(t *testing.T, to netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := net.Dial("udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// answers reports whether a datagram comes back within a while.
func answers(conn net.Conn, payload string) bool {
	buffer := make([]byte, maxPayload)
	if _, err := conn.Write([]byte(payload)); err != nil {
		time.Sleep(20 * time.Millisecond) // nobody listens yet
		return false
	}
	_ = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond)) // an open socket takes one
	n, err := conn.Read(buffer)
	return err == nil && string(buffer[:n]) == payload
}

func TestDatagramsOfManyFlowsComeBackToTheirOwn(t *testing.T) {
	path, _ := startQUIC(t)
	for i := range 100 { // more than a varint of one byte numbers
		socket := dialUDP(t, path.Entry)
		payload := fmt.Sprint(i, strings.Repeat("x", 1190))
		for tries := 0; !answers(socket, payload); { // UDP may lose one
			if tries++; tries == 3 {
				t.Errorf("flow %d did not get its datagram back", i)
				break
			}
		}
	}
}

func TestTheQUICLinkIsMutualTLS(t *testing.T) {
	path, dir := startQUIC(t)
	config, err := tlsConfig(dir, ClientSide)
	if err != nil {
		t.Fatal(err)
	}
	config.NextProtos = []string{quicALPN}
	greet := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		conn, err := quic.DialAddr(t.Context(), path.Link.String(), config, &quic.Config{EnableDatagrams: true})
		if err != nil {
			return err
		}
		defer func() { _ = conn.CloseWithError(0, "") }()
		if _, err = conn.ReceiveDatagram(ctx); errors.Is(err, context.DeadlineExceeded) {
			return nil // the server keeps it
		}
		return err
	}
	if err := greet(); err != nil {
		t.Errorf("with a certificate: %v", err)
	}
	config.Certificates = nil
	if greet() == nil {
		t.Error("the link takes a client without a certificate")
	}
}

func awaitListener(t *testing.T, at netip.AddrPort) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", at.String())
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing listens on %s: %v", at, err)
		}
	}
}

// pairs are all that can be tested here; CI has all of them.
func pairs(t *testing.T) map[string]Pair {
	t.Helper()
	program := []string{os.Args[0], "relay"}
	all := map[string]Pair{"relay-plain": GoRelay{Program: program}, "relay-tls": GoRelay{Program: program, TLS: true}}
	haproxy, haproxyErr := FindHAProxy("")
	envoy, envoyErr := FindEnvoy(os.Getenv("RACEWAY_ENVOY"))
	for name, other := range map[string]struct {
		pair Pair
		err  error
	}{"haproxy": {haproxy, haproxyErr}, "envoy": {envoy, envoyErr}} {
		switch {
		case other.err == nil:
			all[name] = other.pair
		case os.Getenv("RACEWAY_REQUIRE_PEERS") == "1":
			t.Error(other.err)
		default:
			t.Logf("not tested: %v", other.err)
		}
	}
	return all
}

func TestEveryPairPassesOnWhatItIsGiven(t *testing.T) {
	for name, pair := range pairs(t) {
		t.Run(name, func(t *testing.T) {
			path, _ := start(t, pair)
			conn, err := net.Dial("tcp", path.Entry.String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			sent := make([]byte, 1<<20)
			_, _ = rand.Read(sent)
			go func() {
				_, _ = conn.Write(sent) // what is missing is missing in the answer
				_ = conn.(*net.TCPConn).CloseWrite()
			}()
			if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d of %d bytes came back, %v", len(got), len(sent), err)
			}
		})
	}
}

// A yardstick that took anybody would do less than the mesh does.
func TestTheLinkIsMutualTLS(t *testing.T) {
	for name, pair := range pairs(t) {
		if name == "relay-plain" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			path, dir := start(t, pair)
			config, err := tlsConfig(dir, ClientSide)
			if err != nil {
				t.Fatal(err)
			}
			config.NextProtos = []string{"h2"}
			if err := greet(path.Link, config); err != nil {
				t.Errorf("with a certificate: %v", err)
			}
			config.Certificates = nil
			if greet(path.Link, config) == nil {
				t.Error("the link takes a client without a certificate")
			}
		})
	}
}

// greet shakes hands, and waits a moment for the server to refuse: in TLS 1.3 that comes
// after the client's end of the handshake.
func greet(to netip.AddrPort, config *tls.Config) error {
	conn, err := tls.Dial("tcp", to.String(), config)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	if errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		return nil
	}
	return err
}

func TestAProgramThatIsNotThereIsSaidToBeMissing(t *testing.T) {
	nowhere := filepath.Join(t.TempDir(), "nothing")
	for name, find := range map[string]func() error{
		"HAProxy": func() error { _, err := FindHAProxy(nowhere); return err },
		"Envoy":   func() error { _, err := FindEnvoy(nowhere); return err },
	} {
		if err := find(); !errors.Is(err, ErrNotInstalled) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVersionsAreReleases(t *testing.T) {
	for name, pair := range pairs(t) {
		p, ok := pair.(interface{ Version() string })
		if ok && !release.MatchString(p.Version()) {
			t.Errorf("%s says it is %q", name, p.Version())
		}
	}
	if got := versionOf("false"); got != "unknown" {
		t.Errorf("a program that fails is of version %q", got)
	}
}
