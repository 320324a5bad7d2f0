package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

// serve answers on a port of pod with handle until the test ends.
func serve(t *testing.T, pod *lab.Pod, port uint16, handle func(*net.TCPConn)) {
	t.Helper()
	l, err := pod.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	var handlers sync.WaitGroup
	var open sync.Map
	handlers.Go(func() {
		for {
			conn, err := l.AcceptTCP()
			if err != nil {
				return
			}
			open.Store(conn, true)
			handlers.Go(func() {
				defer open.Delete(conn)
				defer conn.Close()
				handle(conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		open.Range(func(conn, _ any) bool { conn.(*net.TCPConn).Close(); return true })
		handlers.Wait()
	})
}

// echo sends back what it gets, and its end.
func echo(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

// ask makes one connection, sends a message of its own, ends its direction, and wants the
// message back, whole.
func ask(ctx context.Context, from *lab.Pod, to netip.AddrPort, message []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	conn, err := from.Dial(ctx, to)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := conn.Write(message); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := conn.CloseWrite(); err != nil {
		return fmt.Errorf("close write: %w", err)
	}
	got, err := io.ReadAll(conn)
	if err != nil {
		return fmt.Errorf("read after %d bytes: %w", len(got), err)
	}
	if !bytes.Equal(got, message) {
		return fmt.Errorf("got %d bytes back that differ from the %d sent", len(got), len(message))
	}
	return nil
}

// noncePrefix begins every nonce, so that one search of a capture finds them all.
var noncePrefix = random(16)

// nonce is a message that is like no other, and that no packet contains by chance.
func nonce() []byte { return slices.Concat(noncePrefix, random(16)) }

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	return b
}

// load opens connections, one after the other on each worker, until it is stopped. A worker pauses
// between two: a port is used again after a minute (TIME_WAIT), and a pod has 28,000 of them.
type load struct {
	cancel context.CancelFunc
	done   sync.WaitGroup
	count  atomic.Int64

	mu   sync.Mutex
	errs []error
}

func startLoad(t *testing.T, workers int, from *lab.Pod, to netip.AddrPort) *load {
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{cancel: cancel}
	for range workers {
		l.done.Go(func() {
			for ctx.Err() == nil {
				time.Sleep(10 * time.Millisecond)
				// Not ctx: a connection under way is to end by itself.
				err := ask(context.WithoutCancel(ctx), from, to, nonce())
				l.count.Add(1)
				if err != nil {
					l.mu.Lock()
					l.errs = append(l.errs, fmt.Errorf("%s: %w", time.Now().Format("15:04:05.000"), err))
					l.mu.Unlock()
				}
			}
		})
	}
	t.Cleanup(func() { l.stop() })
	return l
}

// stop ends the load and returns what went wrong.
func (l *load) stop() []error {
	l.cancel()
	l.done.Wait()
	return l.errs
}

// steady is one connection that stays open and is used now and then.
type steady struct {
	*net.TCPConn
}

func open(t *testing.T, from *lab.Pod, to netip.AddrPort) steady {
	t.Helper()
	conn, err := from.Dial(t.Context(), to)
	if err != nil {
		t.Fatal("open a lasting connection:", err)
	}
	t.Cleanup(func() { conn.Close() })
	return steady{conn}
}

// use sends a message and wants it back.
func (s steady) use() error {
	if err := s.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	message := nonce()
	if _, err := s.Write(message); err != nil {
		return err
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(s, got); err != nil {
		return err
	}
	if !bytes.Equal(got, message) {
		return errors.New("the echo differs")
	}
	return nil
}
