package hbone_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

const shortLife = 10 * time.Minute

func TestConnectionTakesNoNewStreamsOnceItsPeersCertificateExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w *world
		w = newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			c.TLS = func(context.Context, hbone.Key) (*tls.Config, error) {
				config := w.ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
				config.Certificates = []tls.Certificate{w.ca.Issue(t, hbonetest.Leaf{
					IDs: []string{hbonetest.ClientID}, NotAfter: time.Now().Add(shortLife),
				})}
				return config, nil
			}
		})
		old := w.open(t)
		time.Sleep(shortLife / 2)
		again := w.open(t)
		if !again.Reused {
			t.Error("a second connection was made while the certificate was valid")
		}
		_ = again.Close()
		time.Sleep(shortLife/2 + time.Second)
		hbonetest.Ping(t, old) // what lives goes on
		fresh := w.open(t)
		if fresh.Reused {
			t.Error("a stream began on a connection whose certificate had expired")
		}
		hbonetest.Ping(t, fresh)
		_ = fresh.Close()
		_ = old.Close()
	})
}

func connect(t *testing.T, framer *http2.Framer, stream uint32) {
	t.Helper()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, field := range []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "10.0.0.2:80"}} {
		if err := encoder.WriteField(field); err != nil {
			t.Fatal(err)
		}
	}
	if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true}); err != nil {
		t.Fatal(err)
	}
}

// A peer that never answers the drain's PING, but gives other signs of life, is not served
// new streams for ever.
func TestDrainRefusesStreamsOfAPeerThatIgnoresIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		raw, err := w.net.dial(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		config := w.ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
		config.Certificates = []tls.Certificate{w.ca.Issue(t, hbonetest.Leaf{
			IDs: []string{hbonetest.ClientID}, NotAfter: time.Now().Add(shortLife),
		})}
		conn := tls.Client(raw, config)
		defer func() { _ = conn.Close() }()
		if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		framer := http2.NewFramer(conn, conn)
		framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		answers := make(chan uint32, 100)
		go func() { // tells which streams are answered
			defer close(answers)
			for {
				frame, err := framer.ReadFrame()
				if err != nil {
					return
				}
				if f, ok := frame.(*http2.MetaHeadersFrame); ok {
					answers <- f.StreamID
				}
			}
		}()
		if err := framer.WriteSettings(); err != nil {
			t.Fatal(err)
		}
		connect(t, framer, 1)
		if id := <-answers; id != 1 {
			t.Fatalf("stream %d was answered", id)
		}
		for end := time.Now().Add(shortLife + time.Minute); time.Now().Before(end); {
			time.Sleep(5 * time.Second)
			if err := framer.WritePing(false, [8]byte{}); err != nil { // a sign of life
				t.Fatal(err)
			}
		}
		connect(t, framer, 3)
		time.Sleep(10 * time.Second)
		select {
		case id, open := <-answers:
			if open {
				t.Errorf("stream %d was answered long after the certificate had expired", id)
			}
		default:
		}
	})
}

func TestOneAddressCannotTakeAllHandshakes(t *testing.T) {
	ca := hbonetest.NewCA(t)
	config := hbone.ServerConfig{TLS: ca.ServerTLS(t, hbonetest.ServerID), Transport: h2.Server{}, Handler: hbonetest.Echo, MaxHandshakes: 8}
	errs := failures(&config)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{ca: ca}
	w.serve(hbone.NewServer(config), l)
	t.Cleanup(func() {
		w.drain()
		if err := <-w.served; err != nil {
			t.Error(err)
		}
		_ = l.Close()
	})
	from := func(address string) net.Conn {
		t.Helper()
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
		conn, err := dialer.DialContext(t.Context(), "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	for range 3 { // two are its share
		from("127.0.0.1")
	}
	if err := <-errs; !errors.Is(err, hbone.ErrTooManyHandshakes) {
		t.Errorf("server was told %v", err)
	}
	conn := tls.Client(from("127.0.0.2"), ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID))
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Errorf("the handshake of another address: %v", err)
	}
}
