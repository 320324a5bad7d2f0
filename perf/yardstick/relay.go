package yardstick

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// relayBuffer is what one read takes: larger ones gain nothing.
	relayBuffer = 128 << 10
	// relayTimeout is for a connection and its handshake.
	relayTimeout = 10 * time.Second
)

// relay passes connections on, one for one.
type relay struct {
	dial    string
	tls     *tls.Config // nil for none
	side    Side        // which end of the link is encrypted
	buffers sync.Pool   // of *[relayBuffer]byte
}

// Relay is the process of a Go pair's side: it listens on --listen and connects to --dial
// until ctx ends. With --tls client the connections that it makes are TLS, with --tls server
// those that it accepts, with the credentials of the directory --credentials. With --quic client
// it is UDP that it takes, and QUIC that it connects with, and with --quic server the reverse.
func Relay(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("relay", flag.ContinueOnError)
	listen := flags.String("listen", "", "address")
	r := &relay{buffers: sync.Pool{New: func() any { return new([relayBuffer]byte) }}}
	flags.StringVar(&r.dial, "dial", "", "address")
	flags.StringVar((*string)(&r.side), "tls", "", "client or server")
	side := flags.String("quic", "", "client or server")
	credentials := flags.String("credentials", "", "directory")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *side != "" {
		return datagramRelay{listen: *listen, dial: r.dial}.run(ctx, Side(*side), *credentials)
	}
	if r.side != "" {
		config, err := tlsConfig(*credentials, r.side)
		if err != nil {
			return err
		}
		r.tls = config
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", *listen)
	if err != nil {
		return err
	}
	return r.serve(ctx, l)
}

// serve relays what l accepts until ctx ends, and closes l.
func (r *relay) serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // Accept returns then
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		// A connection that breaks ends at both its ends, who are the ones to report it.
		wg.Go(func() { _ = r.pass(ctx, conn.(*net.TCPConn)) })
	}
}

// duplex is a connection with two directions that end apart.
type duplex interface {
	net.Conn
	CloseWrite() error
}

// pass serves one connection to its end.
func (r *relay) pass(ctx context.Context, accepted *net.TCPConn) error {
	defer accepted.Close() //nolint:errcheck // see serve
	stopAccepted := context.AfterFunc(ctx, func() { _ = accepted.Close() })
	defer stopAccepted()
	ready, cancel := context.WithTimeout(ctx, relayTimeout)
	defer cancel()
	var from, to duplex = accepted, nil
	if r.side == ServerSide {
		conn := tls.Server(accepted, r.tls)
		if err := conn.HandshakeContext(ready); err != nil {
			return err
		}
		from = conn
	}
	dialed, err := new(net.Dialer).DialContext(ready, "tcp", r.dial)
	if err != nil {
		return err
	}
	defer dialed.Close() //nolint:errcheck // see serve
	stopDialed := context.AfterFunc(ctx, func() { _ = dialed.Close() })
	defer stopDialed()
	to = dialed.(*net.TCPConn)
	if r.side == ClientSide {
		conn := tls.Client(dialed, r.tls)
		if err := conn.HandshakeContext(ready); err != nil {
			return err
		}
		to = conn
	}
	back := make(chan error, 1)
	go func() { back <- r.copy(from, to, dialed, accepted) }()
	return errors.Join(r.copy(to, from, dialed, accepted), <-back)
}

// copy moves one direction to its end, and ends both when it breaks.
func (r *relay) copy(to, from duplex, both ...net.Conn) error {
	err := r.move(to, from)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		for _, c := range both {
			_ = c.Close() // it is broken already
		}
	}
	return err
}

// move leaves the copy between two TCP connections to the kernel: io.Copy splices.
func (r *relay) move(to, from duplex) error {
	if r.tls == nil {
		_, err := io.Copy(to, from)
		return err
	}
	buffer := r.buffers.Get().(*[relayBuffer]byte)
	defer r.buffers.Put(buffer)
	// Bare interfaces: with its ReadFrom a TCP connection would choose a smaller buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, buffer[:])
	return err
}
