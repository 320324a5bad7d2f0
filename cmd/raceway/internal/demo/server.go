package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
)

const (
	dbPort   = 3306
	loadPort = 8080 // of the server that the measurement talks to
)

// Server is the application in the pod db. It speaks first, as databases do, and says whom
// it sees; then it confirms every line that it gets:
//
//	◄── hello 10.244.1.2:41234, this is db
//	pay 42.00 … order <nonce> ──►
//	◄── done <nonce>
type Server struct {
	// Socket is where it answers questions.
	Socket string

	mu      sync.Mutex
	served  map[netip.Addr]int  // requests by client
	clients map[string]net.Conn // that are connected
}

// clientCount is how many requests a client made.
type clientCount struct {
	Client   netip.Addr `json:"client"`
	Requests int        `json:"requests"`
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	s.served, s.clients = make(map[netip.Addr]int), make(map[string]net.Conn)
	app, err := new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf(":%d", dbPort))
	if err != nil {
		return err
	}
	load, err := new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf(":%d", loadPort))
	if err != nil {
		return errors.Join(err, app.Close())
	}
	datagrams, err := new(net.ListenConfig).ListenPacket(ctx, "udp", fmt.Sprintf(":%d", datagramPort))
	if err != nil {
		return errors.Join(err, app.Close(), load.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.serve(ctx, app) })
	group.Go(func() error { return serveDatagrams(ctx, datagrams) })
	group.Go(func() error { return traffic.Serve(ctx, load) })
	group.Go(func() error { return serveControl(ctx, s.Socket, s.handler()) })
	return group.Wait()
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/served", answer(func(*http.Request) ([]clientCount, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		counts := []clientCount{}
		for client, n := range s.served {
			counts = append(counts, clientCount{client, n})
		}
		return counts, nil
	}))
	return mux
}

func (s *Server) serve(ctx context.Context, l net.Listener) error {
	var handlers sync.WaitGroup
	defer handlers.Wait()
	stop := context.AfterFunc(ctx, func() {
		_ = l.Close() // Accept returns then, whatever Close said
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, conn := range s.clients {
			_ = conn.Close() // its handler returns then
		}
	})
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		handlers.Go(func() { s.handle(ctx, conn) })
	}
}

// handle serves one client. What goes wrong is the client's to report.
func (s *Server) handle(ctx context.Context, conn net.Conn) {
	defer conn.Close() //nolint:errcheck // nothing is left to say
	peer := conn.RemoteAddr().String()
	addr, err := netip.ParseAddrPort(peer)
	if err != nil {
		return
	}
	client := addr.Addr().Unmap()
	s.mu.Lock()
	s.clients[peer] = conn
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.clients, peer)
	}()
	if ctx.Err() != nil {
		return
	}
	if _, err := fmt.Fprintf(conn, "hello %s, this is db\n", netip.AddrPortFrom(client, addr.Port())); err != nil {
		return
	}
	lines := bufio.NewReader(conn)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		s.mu.Lock()
		s.served[client]++
		s.mu.Unlock()
		words := strings.Fields("nothing " + line)
		if _, err := fmt.Fprintf(conn, "done %s\n", words[len(words)-1]); err != nil {
			return
		}
	}
}
