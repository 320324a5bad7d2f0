// Package traffic is load on the path between two pods: a server, and clients for bulk
// transfer, request and response, new connections, and datagrams. It knows nothing of the mesh.
//
// The first byte of a connection says what it is for:
//
//	'B' data …… FIN             ──►   ◄── number of bytes (8, big endian) FIN
//	'D' any byte …… FIN         ──►   ◄── data …… until the FIN, number of bytes (8, big endian) FIN
//	'E' size (4, big endian)
//	    request of that size    ──►   ◄── the same bytes, again and again
//	'C'                         ──►   ◄── 'C' FIN
//	'S' data …… FIN             ──►   ◄── the same data …… FIN
//
// Each client checks what it gets back, so a path that loses or changes bytes fails.
package traffic

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	bulkMode     = 'B'
	downloadMode = 'D'
	echoMode     = 'E'
	connectMode  = 'C'
	streamMode   = 'S'

	// MessageSize is the size of a request and of its response, unless told otherwise.
	MessageSize = 1 << 10
	// maxMessageSize bounds what a client can make the server hold.
	maxMessageSize = 1 << 20
	// chunkSize is what one write or read moves in bulk.
	chunkSize = 128 << 10
	// dialTimeout is for one connection to stand.
	dialTimeout = 10 * time.Second
	// answerTimeout is for an answer after the last byte was sent: what is in flight is
	// bounded by windows of some MiB.
	answerTimeout = 30 * time.Second
)

// Serve answers on l until ctx ends, and then closes l and every connection.
func Serve(ctx context.Context, l net.Listener) error {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		conns = make(map[net.Conn]bool)
	)
	stop := context.AfterFunc(ctx, func() {
		_ = l.Close() // Accept returns then, whatever Close said
		mu.Lock()
		defer mu.Unlock()
		for c := range conns {
			_ = c.Close() // its goroutine returns then
		}
	})
	defer stop()
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		mu.Lock()
		conns[conn] = true
		mu.Unlock()
		wg.Go(func() {
			// A client sees a broken exchange itself, and is the one to report it.
			_ = answer(conn)
			_ = conn.Close()
			mu.Lock()
			delete(conns, conn)
			mu.Unlock()
		})
	}
}

func answer(conn net.Conn) error {
	var mode [1]byte
	if _, err := io.ReadFull(conn, mode[:]); err != nil {
		return err
	}
	switch mode[0] {
	case bulkMode:
		return answerBulk(conn)
	case downloadMode:
		return answerDownload(conn)
	case echoMode:
		return answerEcho(conn)
	case streamMode:
		// Bare interfaces: the kernel would splice otherwise, which no application does.
		_, err := io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}, make([]byte, 32<<10))
		return err
	case connectMode:
		_, err := conn.Write(mode[:])
		return err
	}
	return fmt.Errorf("unknown mode %q", mode[0])
}

// answerBulk reads into a buffer of our own: io.Discard would let the kernel splice or use
// its small buffers, which no application does.
func answerBulk(conn net.Conn) error {
	var (
		buffer = make([]byte, chunkSize)
		total  uint64
	)
	for {
		n, err := conn.Read(buffer)
		total += uint64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	_, err := conn.Write(binary.BigEndian.AppendUint64(nil, total))
	return err
}

// answerDownload sends until the client ends its direction.
func answerDownload(conn net.Conn) error {
	var word [1]byte
	if _, err := io.ReadFull(conn, word[:]); err != nil {
		return err
	}
	enough := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, conn) // nothing is to come
		enough <- err
	}()
	chunk := randomBytes(chunkSize)
	var total uint64
	for {
		select {
		case err := <-enough:
			if err != nil {
				return err
			}
			_, err = conn.Write(binary.BigEndian.AppendUint64(nil, total))
			return err
		default:
		}
		n, err := conn.Write(chunk)
		total += uint64(n)
		if err != nil {
			_ = conn.Close() // the reader returns then
			return errors.Join(err, <-enough)
		}
	}
}

// randomBytes cannot be compressed on the way.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	return b
}

func answerEcho(conn net.Conn) error {
	var header [4]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(header[:])
	if size == 0 || size > maxMessageSize {
		return fmt.Errorf("messages of %d bytes: want 1 to %d", size, maxMessageSize)
	}
	buffer := make([]byte, size)
	for {
		if _, err := io.ReadFull(conn, buffer); err != nil {
			return err
		}
		if _, err := conn.Write(buffer); err != nil {
			return err
		}
	}
}

// dial opens a connection for one use: header says which.
func dial(ctx context.Context, to netip.AddrPort, header ...byte) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(header); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn.(*net.TCPConn), nil
}

// dialAll opens n connections, or none.
func dialAll(ctx context.Context, to netip.AddrPort, n int, header ...byte) ([]*net.TCPConn, error) {
	conns := make([]*net.TCPConn, 0, n)
	for range n {
		conn, err := dial(ctx, to, header...)
		if err != nil {
			return nil, errors.Join(err, closeAll(conns))
		}
		conns = append(conns, conn)
	}
	return conns, nil
}

func closeAll[C net.Conn](conns []C) error {
	var errs []error
	for _, c := range conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
