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

// Held are connections, or flows of UDP, that are open and idle.
type Held struct {
	conns []net.Conn
	what  string // they are
	open  func(context.Context) (net.Conn, error)
	ask   func(net.Conn) error
}

// Hold opens that many connections, and exchanges a message on each, so that each is known
// to reach the server.
func Hold(ctx context.Context, to netip.AddrPort, n int) (*Held, error) {
	h := &Held{what: "connections", ask: exchangeOnce, open: func(ctx context.Context) (net.Conn, error) {
		return dial(ctx, to, binary.BigEndian.AppendUint32([]byte{echoMode}, MessageSize)...)
	}}
	return h, h.fill(ctx, n)
}

// fill opens n of them, or none.
func (h *Held) fill(ctx context.Context, n int) error {
	var (
		mu    sync.Mutex
		group errgroup.Group
	)
	group.SetLimit(holdAtOnce)
	for range n {
		group.Go(func() error {
			conn, err := h.open(ctx)
			if err != nil {
				return err
			}
			mu.Lock()
			h.conns = append(h.conns, conn)
			mu.Unlock()
			return h.ask(conn)
		})
	}
	if err := group.Wait(); err != nil {
		return errors.Join(fmt.Errorf("hold %d %s: %w", n, h.what, err), h.Close())
	}
	return nil
}

// Check exchanges a message on each, and fails when one is dead.
func (h *Held) Check() error {
	var group errgroup.Group
	group.SetLimit(holdAtOnce)
	for _, conn := range h.conns {
		group.Go(func() error { return h.ask(conn) })
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("ask %d idle %s: %w", len(h.conns), h.what, err)
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
