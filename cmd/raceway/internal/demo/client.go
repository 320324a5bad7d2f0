package demo

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
)

const (
	// requestInterval is between two new connections of a client.
	requestInterval = 40 * time.Millisecond
	// lastingInterval is between two uses of a connection that stays open.
	lastingInterval = 100 * time.Millisecond
	// requestTimeout is when a request counts as failed.
	requestTimeout = 10 * time.Second
	// kept is how many requests a client can tell about.
	kept = 8192
)

// cardNumber is in every request, and never in what is sent on a connection that lasts.
const cardNumber = "4111-1111-1111-1111"

// payment is a request with a nonce of its own, which no packet contains by chance.
func payment(nonce string) string {
	return "pay 42.00 from card " + cardNumber + " order " + nonce
}

func newNonce() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// Client is the application in a client pod. Over and over it opens a connection, makes one
// request and closes it; on demand it keeps connections open and uses them.
type Client struct {
	// Socket is where it answers questions.
	Socket string
	// Target is whom it asks.
	Target netip.AddrPort

	mu       sync.Mutex
	requests []request
	count    int
	lasting  map[string]*lasting
}

// request is one connection with one request.
type request struct {
	At    time.Time      `json:"at"` // when it began
	Took  time.Duration  `json:"took"`
	Nonce string         `json:"nonce"`
	Local netip.AddrPort `json:"local,omitzero"` // the client's own address
	Seen  netip.AddrPort `json:"seen,omitzero"`  // the client as the server saw it
	Error string         `json:"error,omitempty"`
}

// lastingReport is how a connection that stays open fares.
type lastingReport struct {
	Requests int       `json:"requests"`
	Ended    time.Time `json:"ended,omitzero"`
	Error    string    `json:"error,omitempty"`
}

// clientReport is what a client went through: requests since a time, the count of all.
type clientReport struct {
	Count    int                      `json:"count"`
	Requests []request                `json:"requests"`
	Lasting  map[string]lastingReport `json:"lasting"`
}

// Questions to a client.
type (
	reportQuestion struct {
		Since time.Time `json:"since"`
	}
	connectionQuestion struct {
		Name   string         `json:"name"`
		Target netip.AddrPort `json:"target,omitzero"`
	}
	loadQuestion struct {
		Target   netip.AddrPort `json:"target"`
		Conns    int            `json:"conns"`
		Rate     float64        `json:"rate"`
		Duration time.Duration  `json:"duration"`
	}
)

// Run makes requests until ctx ends.
func (c *Client) Run(ctx context.Context) error {
	c.lasting = make(map[string]*lasting)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		c.loop(ctx)
		return nil
	})
	group.Go(func() error { return serveControl(ctx, c.Socket, c.handler(ctx)) })
	err := group.Wait()
	c.mu.Lock()
	all := c.lasting
	c.lasting = nil // no more are opened
	c.mu.Unlock()
	for _, l := range all {
		l.end()
	}
	return err
}

func (c *Client) loop(ctx context.Context) {
	tick := time.NewTicker(requestInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r := once(ctx, c.Target)
		if ctx.Err() != nil {
			return
		}
		c.mu.Lock()
		c.count++
		c.requests = append(c.requests, r)
		if len(c.requests) > 2*kept {
			c.requests = slices.Delete(c.requests, 0, len(c.requests)-kept)
		}
		c.mu.Unlock()
	}
}

func (c *Client) handler(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/report", answer(func(r *http.Request) (clientReport, error) {
		q, err := read[reportQuestion](r)
		return c.report(q.Since), err
	}))
	mux.Handle("/request", answer(func(r *http.Request) (request, error) {
		q, err := read[connectionQuestion](r)
		if err != nil {
			return request{}, err
		}
		return once(r.Context(), q.Target), nil
	}))
	mux.Handle("/open", answer(func(r *http.Request) (lastingReport, error) {
		q, err := read[connectionQuestion](r)
		if err != nil {
			return lastingReport{}, err
		}
		return c.open(ctx, q)
	}))
	mux.Handle("/close", answer(func(r *http.Request) (lastingReport, error) {
		q, err := read[connectionQuestion](r)
		if err != nil {
			return lastingReport{}, err
		}
		return c.close(q.Name)
	}))
	mux.Handle("/datagrams", answer(func(r *http.Request) ([]request, error) {
		q, err := read[datagramQuestion](r)
		if err != nil {
			return nil, err
		}
		return sendOrders(r.Context(), q)
	}))
	mux.Handle("/load", answer(func(r *http.Request) (traffic.RateResult, error) {
		q, err := read[loadQuestion](r)
		if err != nil {
			return traffic.RateResult{}, err
		}
		return traffic.Exchange(r.Context(), q.Target, traffic.ExchangeOptions{Conns: q.Conns, Rate: q.Rate, Duration: q.Duration})
	}))
	return mux
}

func (c *Client) report(since time.Time) clientReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	report := clientReport{Count: c.count, Requests: []request{}, Lasting: make(map[string]lastingReport)}
	for _, r := range c.requests {
		if !r.At.Before(since) {
			report.Requests = append(report.Requests, r)
		}
	}
	for name, l := range c.lasting {
		report.Lasting[name] = l.report()
	}
	return report
}

// open keeps a connection open until close, and returns when it was used once.
func (c *Client) open(ctx context.Context, q connectionQuestion) (lastingReport, error) {
	l, err := newLasting(ctx, q.Target)
	if err != nil {
		return lastingReport{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lasting == nil || c.lasting[q.Name] != nil {
		return lastingReport{}, errors.Join(fmt.Errorf("connection %q is open, or the client ends", q.Name), l.conn.Close())
	}
	c.lasting[q.Name] = l
	go l.run()
	return l.report(), nil
}

func (c *Client) close(name string) (lastingReport, error) {
	c.mu.Lock()
	l := c.lasting[name]
	delete(c.lasting, name)
	c.mu.Unlock()
	if l == nil {
		return lastingReport{}, fmt.Errorf("there is no connection %q", name)
	}
	report := l.report()
	l.end()
	return report, nil
}

// session is a connection to the server, after its greeting.
type session struct {
	net.Conn
	lines *bufio.Reader
	seen  netip.AddrPort
}

// dial connects and waits for the server to speak: nothing is sent before.
func dial(ctx context.Context, target netip.AddrPort) (*session, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", target.String())
	if err != nil {
		return nil, err
	}
	s := &session{Conn: conn, lines: bufio.NewReader(conn)}
	if err := s.greeting(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return s, nil
}

func (s *session) greeting() error {
	if err := s.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return err
	}
	line, err := s.lines.ReadString('\n')
	if err != nil {
		return err
	}
	words := strings.Fields(line)
	if len(words) < 2 || words[0] != "hello" {
		return fmt.Errorf("the server greets with %q", line)
	}
	s.seen, err = netip.ParseAddrPort(strings.TrimSuffix(words[1], ","))
	return err
}

// request sends a line that ends with the nonce and wants it confirmed.
func (s *session) request(text, nonce string) error {
	if err := s.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return err
	}
	if _, err := s.Write([]byte(text + "\n")); err != nil {
		return err
	}
	line, err := s.lines.ReadString('\n')
	if err != nil {
		return err
	}
	if line != "done "+nonce+"\n" {
		return fmt.Errorf("the server answers %q", line)
	}
	return nil
}

// once makes one connection with one request.
func once(ctx context.Context, target netip.AddrPort) request {
	r := request{At: time.Now(), Nonce: newNonce()}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err := func() error {
		s, err := dial(ctx, target)
		if err != nil {
			return err
		}
		r.Seen = s.seen
		if local, ok := s.LocalAddr().(*net.TCPAddr); ok {
			r.Local = local.AddrPort()
		}
		return errors.Join(s.request(payment(r.Nonce), r.Nonce), s.Close())
	}()
	if err != nil {
		r.Error = err.Error()
	}
	r.Took = time.Since(r.At)
	return r
}

// lasting is a connection that stays open and is used all the time.
type lasting struct {
	conn *session
	stop chan struct{}
	done chan struct{}

	mu    sync.Mutex
	state lastingReport
}

func newLasting(ctx context.Context, target netip.AddrPort) (*lasting, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	conn, err := dial(ctx, target)
	if err != nil {
		return nil, err
	}
	l := &lasting{conn: conn, stop: make(chan struct{}), done: make(chan struct{})}
	if err := l.use(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return l, nil
}

func (l *lasting) use() error {
	nonce := newNonce()
	if err := l.conn.request("still here, and I keep this one connection open "+nonce, nonce); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.Requests++
	return nil
}

// run uses the connection until it breaks, which may be between two uses, or end.
func (l *lasting) run() {
	defer close(l.done)
	tick := time.NewTicker(lastingInterval)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
		if err := l.use(); err != nil {
			l.mu.Lock()
			l.state.Ended, l.state.Error = time.Now(), err.Error()
			l.mu.Unlock()
			_ = l.conn.Close() // it is broken
			return
		}
	}
}

func (l *lasting) report() lastingReport {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// end closes the connection and waits until nobody uses it.
func (l *lasting) end() {
	close(l.stop)
	_ = l.conn.Close() // it may be broken already
	<-l.done
}
