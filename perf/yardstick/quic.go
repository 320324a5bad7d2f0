package yardstick

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/quicvarint"
)

// QUICRelay is a pair for UDP as a Go programmer writes it with quic-go: see Relay.
type QUICRelay struct {
	// Program is as GoRelay's.
	Program []string
}

// Command is part of Pair.
func (q QUICRelay) Command(dir string, side Side, path Path) (*exec.Cmd, error) {
	listen, dial := path.hop(side)
	args := append(slices.Clone(q.Program[1:]), "--listen", listen.String(), "--dial", dial.String(), "--quic", string(side), "--credentials", dir)
	return exec.Command(q.Program[0], args...), nil
}

const (
	quicALPN = "relay"
	// quicKeepAlive keeps the connection when every flow idles.
	quicKeepAlive = 10 * time.Second
	// entryBuffer holds what clients send while the relay waits for a CPU, as far as the kernel
	// lets it: with what sockets have otherwise, one in a hundred datagrams of 1,200 bytes was lost.
	entryBuffer = 1 << 20
	maxPayload  = 65535
)

// datagramRelay passes UDP on in QUIC DATAGRAM frames (RFC 9221) of one connection, each with the
// number of its flow in front, a varint. The client's side numbers flows as they come, and the
// server's has a socket for each. None ends before the relay does.
//
//	client ─► UDP socket ─► number, payload ══ QUIC ══► number's UDP socket ─► application
type datagramRelay struct {
	listen, dial string
	tls          *tls.Config
}

func (r datagramRelay) run(ctx context.Context, side Side, credentials string) (err error) {
	if r.tls, err = tlsConfig(credentials, side); err != nil {
		return err
	}
	r.tls.NextProtos = []string{quicALPN}
	if side == ServerSide {
		return r.serve(ctx)
	}
	return r.connect(ctx)
}

func (r datagramRelay) quicConfig() *quic.Config {
	return &quic.Config{EnableDatagrams: true, KeepAlivePeriod: quicKeepAlive}
}

// serve is the server's side: it accepts connections until ctx ends.
func (r datagramRelay) serve(ctx context.Context) error {
	l, err := quic.ListenAddr(r.listen, r.tls, r.quicConfig())
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.Close() //nolint:errcheck // it only ends
	for {
		conn, err := l.Accept(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		wg.Go(func() {
			_ = r.unpack(ctx, conn) // the other side reports it
			_ = conn.CloseWithError(0, "")
		})
	}
}

// unpack gives what comes to the application, each flow by a socket of its own.
func (r datagramRelay) unpack(ctx context.Context, conn *quic.Conn) error {
	sockets := make(map[uint64]net.Conn)
	var wg sync.WaitGroup
	defer func() {
		for _, s := range sockets {
			_ = s.Close() // its reader returns then
		}
		wg.Wait()
	}()
	for {
		p, err := conn.ReceiveDatagram(ctx)
		if err != nil {
			return err
		}
		number, n, err := quicvarint.Parse(p)
		if err != nil {
			return fmt.Errorf("datagram without a flow: %w", err)
		}
		socket := sockets[number]
		if socket == nil {
			if socket, err = new(net.Dialer).DialContext(ctx, "udp", r.dial); err != nil {
				return err
			}
			sockets[number] = socket
			wg.Go(func() { pack(conn, number, socket) })
		}
		_, _ = socket.Write(p[n:]) // nobody may listen yet
	}
}

// pack sends what the application says in one flow, until the socket is closed.
func pack(conn *quic.Conn, number uint64, socket net.Conn) {
	prefix := quicvarint.Append(nil, number)
	buffer := make([]byte, maxPayload)
	n := copy(buffer, prefix)
	for {
		read, err := socket.Read(buffer[n:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_ = conn.SendDatagram(buffer[:n+read]) // what is too large is lost, as on any network
		}
	}
}

// connect is the client's side: it takes datagrams once the connection stands.
func (r datagramRelay) connect(ctx context.Context) error {
	conn, err := quic.DialAddr(ctx, r.dial, r.tls, r.quicConfig())
	if err != nil {
		return fmt.Errorf("connect to the other side: %w", err)
	}
	defer conn.CloseWithError(0, "") //nolint:errcheck // it only ends
	taken, err := new(net.ListenConfig).ListenPacket(ctx, "udp", r.listen)
	if err != nil {
		return err
	}
	socket := taken.(*net.UDPConn)
	if err := socket.SetReadBuffer(entryBuffer); err != nil {
		return errors.Join(fmt.Errorf("enlarge the queue of datagrams: %w", err), socket.Close())
	}
	stop := context.AfterFunc(conn.Context(), func() { _ = socket.Close() }) // reading returns then
	defer stop()
	end := context.AfterFunc(ctx, func() { _ = conn.CloseWithError(0, "") })
	defer end()
	var flows flows
	var wg sync.WaitGroup
	wg.Go(func() { flows.toQUIC(conn, socket) })
	flows.fromQUIC(conn, socket)
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("the connection ended: %w", context.Cause(conn.Context()))
}

// flows are the client's side's: a number for each address.
type flows struct {
	mu      sync.Mutex
	clients []netip.AddrPort // by number
}

func (f *flows) toQUIC(conn *quic.Conn, socket *net.UDPConn) {
	numbers := make(map[netip.AddrPort]uint64)
	buffer, out := make([]byte, maxPayload), make([]byte, 0, maxPayload)
	for {
		n, from, err := socket.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return
		}
		number, known := numbers[from]
		if !known {
			number = uint64(len(numbers))
			numbers[from] = number
			f.mu.Lock()
			f.clients = append(f.clients, from)
			f.mu.Unlock()
		}
		out = append(quicvarint.Append(out[:0], number), buffer[:n]...)
		_ = conn.SendDatagram(out) // what is too large is lost, as on any network
	}
}

func (f *flows) fromQUIC(conn *quic.Conn, socket *net.UDPConn) {
	for {
		p, err := conn.ReceiveDatagram(context.Background()) // ends with the connection
		if err != nil {
			return
		}
		number, n, err := quicvarint.Parse(p)
		f.mu.Lock()
		if err != nil || number >= uint64(len(f.clients)) {
			f.mu.Unlock()
			continue
		}
		to := f.clients[number]
		f.mu.Unlock()
		_, _ = socket.WriteToUDPAddrPort(p[n:], to) // a client may have gone
	}
}
