package traffic

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// holdAtOnce is how many connections are opened, or asked, at the same time.
const holdAtOnce = 32

// Held are connections that are open and idle.
type Held struct{ conns []*net.TCPConn }

// Hold opens that many connections, and exchanges a message on each, so that each is known
// to reach the server.
func Hold(ctx context.Context, to netip.AddrPort, n int) (*Held, error) {
	var (
		held  Held
		mu    sync.Mutex
		group errgroup.Group
	)
	group.SetLimit(holdAtOnce)
	for range n {
		group.Go(func() error {
			conn, err := dial(ctx, to, binary.BigEndian.AppendUint32([]byte{echoMode}, MessageSize)...)
			if err != nil {
				return err
			}
			mu.Lock()
			held.conns = append(held.conns, conn)
			mu.Unlock()
			return exchangeOnce(conn)
		})
	}
	if err := group.Wait(); err != nil {
		return nil, errors.Join(fmt.Errorf("hold %d connections: %w", n, err), held.Close())
	}
	return &held, nil
}

// Check exchanges a message on each connection, and fails when one is dead.
func (h *Held) Check() error {
	var group errgroup.Group
	group.SetLimit(holdAtOnce)
	for _, conn := range h.conns {
		group.Go(func() error { return exchangeOnce(conn) })
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("ask %d idle connections: %w", len(h.conns), err)
	}
	return nil
}

// Close closes them all.
func (h *Held) Close() error { return closeAll(h.conns) }

func exchangeOnce(conn net.Conn) error {
	request, response := randomBytes(MessageSize), make([]byte, MessageSize)
	if _, err := conn.Write(request); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, response); err != nil {
		return err
	}
	if !bytes.Equal(request, response) {
		return errors.New("the response is not the request")
	}
	return nil
}
