package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

const (
	webID   = "spiffe://cluster.local/ns/shop/sa/web"
	rogueID = "spiffe://cluster.local/ns/shop/sa/rogue"
)

// mint signs a certificate with the mesh's own key, as it never would.
func (c *cluster) mint(template *x509.Certificate) tls.Certificate {
	c.t.Helper()
	dir := c.CA().DataDir
	ca, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca-cert.pem"), filepath.Join(dir, "ca-key.pem"))
	if err != nil {
		c.t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, &key.PublicKey, ca.PrivateKey)
	if err != nil {
		c.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// expired is a certificate of the day before.
func expired(id string) *x509.Certificate {
	leaf := certstest.Leaf(id)
	leaf.NotBefore, leaf.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)
	return leaf
}

// wrong are certificates that nobody may accept, by the cause that an agent gives.
func (c *cluster) wrong(id string) map[string]tls.Certificate {
	stranger := certstest.New(c.t, "cluster.local")
	foreign := certstest.New(c.t, "elsewhere.example")
	noUsage := certstest.Leaf(id)
	noUsage.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection}
	return map[string]tls.Certificate{
		"uri_san":      c.mint(certstest.Leaf(id, id+"-too")),
		"trust_domain": foreign.Issue(c.t, certstest.Leaf("spiffe://elsewhere.example/ns/shop/sa/web")),
		"untrusted":    stranger.Issue(c.t, certstest.Leaf(id)),
		"expired":      c.mint(expired(id)),
		"usage":        c.mint(noUsage),
	}
}

// Peers that break the rules are refused, each in the way that the rule wants, and others'
// connections do not notice.
func TestServerRefusesBadPeers(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		s := newShop(t, opts)
		serve(t, s.db, portEcho, echo)
		lasting := open(t, s.web, s.db.AddrPort(portEcho))
		good := s.mint(certstest.Leaf(webID))
		target := s.db.AddrPort(portEcho).String()

		bad := s.wrong(webID)
		bad["no_certificate"] = tls.Certificate{}
		for cause, certificate := range bad {
			t.Run(cause, func(t *testing.T) {
				failures := func() float64 {
					return s.scrape(2).sum("raceway_handshake_failures_total", "direction", "inbound", "cause", cause)
				}
				before := failures()
				if peer, err := s.dialPeer(certificate); err == nil {
					// In TLS 1.3 a client learns of its refusal with its first read.
					if err = peer.hello(); err == nil {
						t.Error("the handshake succeeded")
					}
				}
				eventually(t, "the refusal is counted", func() error {
					if n := failures() - before; n != 1 {
						return fmt.Errorf("%v handshakes failed because of %s", n, cause)
					}
					return nil
				})
				if err := lasting.use(); err != nil {
					t.Error("another connection:", err)
				}
			})
		}

		connect := func(authority string) []string { return []string{":method", "CONNECT", ":authority", authority} }
		peer, err := s.dialPeer(good)
		if err == nil {
			err = peer.hello()
		}
		if err != nil {
			t.Fatal(err)
		}
		large := strings.Repeat("x", 20<<10)
		for name, request := range map[string]struct {
			status string
			fields []string
		}{
			"as it should be":      {"200", connect(target)},
			"another pod's":        {"400", connect(s.near.AddrPort(portEcho).String())},
			"nobody's":             {"400", connect(netip.AddrPortFrom(s.farAddr(), portEcho).String())},
			"no authority":         {"400", connect("")},
			"the tunnel's port":    {"400", connect(s.db.AddrPort(dataplane.PortTunnel).String())},
			"the outbound port":    {"400", connect(s.db.AddrPort(dataplane.PortOutbound).String())},
			"the inbound port":     {"400", connect(s.db.AddrPort(dataplane.PortInbound).String())},
			"a port nobody serves": {"503", connect(s.db.AddrPort(portClosed).String())},
			"GET":                  {"400", []string{":method", "GET", ":scheme", "https", ":path", "/", ":authority", target}},
			"headers of 80 KiB":    {"431", append(connect(target), "x-a", large, "x-b", large, "x-c", large, "x-d", large)},
		} {
			t.Run(name, func(t *testing.T) {
				if status, err := peer.request(request.fields...); err != nil || status != request.status {
					t.Errorf("answered %q and %v, want %s", status, err, request.status)
				}
				if status, err := peer.request(connect(target)...); err != nil || status != "200" {
					t.Errorf("the next stream was answered %q and %v", status, err)
				}
				if err := lasting.use(); err != nil {
					t.Error("another connection:", err)
				}
			})
		}
		if conn, err := s.plain.Dial(t.Context(), s.plain.AddrPort(dataplane.PortTunnel)); err == nil {
			conn.Close()
			t.Error("a pod without the mesh takes tunnels")
		}
	})
}

// peer is an HBONE client that says what it is told to.
type peer struct {
	*http2.Framer
	conn    *tls.Conn
	streams uint32
	block   bytes.Buffer
	encoder *hpack.Encoder
}

// dialPeer connects to db's tunnel port from a pod without the mesh.
func (s *shop) dialPeer(certificate tls.Certificate) (*peer, error) {
	raw, err := s.plain.Dial(s.t.Context(), s.db.AddrPort(dataplane.PortTunnel))
	if err != nil {
		return nil, err
	}
	s.t.Cleanup(func() { raw.Close() })
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	config := &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil },
	}
	p := &peer{conn: tls.Client(raw, config)}
	p.Framer = http2.NewFramer(p.conn, p.conn)
	p.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.encoder = hpack.NewEncoder(&p.block)
	return p, p.conn.Handshake()
}

// hello exchanges the first frames.
func (p *peer) hello() error {
	_, err := io.WriteString(p.conn, http2.ClientPreface)
	if err = errors.Join(err, p.WriteSettings()); err != nil {
		return err
	}
	frame, err := p.ReadFrame()
	if err != nil {
		return err
	}
	if _, ok := frame.(*http2.SettingsFrame); !ok {
		return fmt.Errorf("the first frame is %v", frame)
	}
	return p.WriteSettingsAck()
}

// request opens a stream and returns the status that it is answered with.
func (p *peer) request(fields ...string) (string, error) {
	id := 2*p.streams + 1
	p.streams++
	p.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		if err := p.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			return "", err
		}
	}
	block := p.block.Bytes()
	for first := true; first || len(block) > 0; first = false {
		part := block[:min(len(block), 16<<10)]
		block = block[len(part):]
		var err error
		if first {
			err = p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: part, EndHeaders: len(block) == 0})
		} else {
			err = p.WriteContinuation(id, len(block) == 0, part)
		}
		if err != nil {
			return "", err
		}
	}
	for {
		frame, err := p.ReadFrame()
		if err != nil {
			return "", err
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			if frame.StreamID == id {
				return frame.PseudoValue("status"), nil
			}
		case *http2.RSTStreamFrame:
			if frame.StreamID == id {
				return "", fmt.Errorf("the stream was reset: %s", frame.ErrCode)
			}
		case *http2.GoAwayFrame:
			return "", fmt.Errorf("the connection ends: %s", frame.ErrCode)
		case *http2.PingFrame:
			if err := p.WritePing(true, frame.Data); err != nil {
				return "", err
			}
		}
	}
}

// An agent tells nobody but the workload that it means to reach anything: what it cannot
// verify is refused, never replaced by plaintext, and seen as a reset.
func TestClientRefusesBadServers(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		opts.Nodes = 3
		c := newCluster(t, opts)
		web, db, rogue := c.pod("web", 1), c.pod("db", 2), c.pod("rogue", 3)
		serve(t, db, portEcho, echo)
		clear := make(chan struct{}, 1)
		serve(t, rogue, portEcho, func(*net.TCPConn) { clear <- struct{}{} })
		if _, err := c.StartCA(t.Context()); err != nil {
			t.Fatal(err)
		}
		for node := range 2 { // the third has no agent: what stands there is ours
			if _, err := c.StartAgent(t.Context(), c.Node(node+1)); err != nil {
				t.Fatal(err)
			}
		}
		publisher, err := file.NewPublisher(c.StatusDir(), "node3")
		if err == nil {
			err = publisher.PublishCaptured(t.Context(), []string{rogue.UID}, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		c.enrol(web, db)
		c.awaitWay(dataplane.ProtocolHBONE, rogue)
		lasting := open(t, web, db.AddrPort(portEcho))

		shown := make(chan tls.Certificate, 1)
		serve(t, rogue, dataplane.PortTunnel, func(conn *net.TCPConn) {
			config := &tls.Config{ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}}
			select {
			case certificate := <-shown:
				config.Certificates = []tls.Certificate{certificate}
			case <-t.Context().Done(): // one connection more than refusals
				return
			}
			server := tls.Server(conn, config)
			_ = server.Handshake()
			_, _ = io.Copy(io.Discard, server)
		})
		bad := c.wrong(rogueID)
		bad["wrong_identity"] = c.mint(certstest.Leaf(webID))
		for cause, certificate := range bad {
			t.Run(cause, func(t *testing.T) {
				failures := func() float64 {
					return c.scrape(1).sum("raceway_handshake_failures_total", "direction", "outbound", "cause", cause)
				}
				before := failures()
				shown <- certificate
				if err := refused(web, rogue.AddrPort(portEcho)); err != nil {
					t.Error(err)
				}
				eventually(t, "the refusal is counted", func() error {
					if n := failures() - before; n != 1 {
						return fmt.Errorf("%v handshakes failed because of %s", n, cause)
					}
					return nil
				})
				if err := lasting.use(); err != nil {
					t.Error("another connection:", err)
				}
			})
		}
		c.flow(1, "a refused server", func(f admin.Flow) bool { return f.Event == admin.FlowFailed && f.Flags == "TLS_FAILURE" })
		select {
		case <-clear:
			t.Error("the application was reached in clear")
		default:
		}
	})
}
