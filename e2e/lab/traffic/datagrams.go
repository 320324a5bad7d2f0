package traffic

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sync/errgroup"
)

// Each datagram says by its first byte what it is for; numbers are of eight bytes, big endian.
//
//	'D' run, number, time, padding  ──►   ◄── 'A' one more than the greatest number, time of the last:
//	                                          for each confirmEvery that arrived
//	'Q' run                         ──►   ◄── 'Q' run, how many arrived, how many of them changed
//	'E' number, time, padding       ──►   ◄── the same
const (
	dataDatagram    = 'D'
	confirmDatagram = 'A'
	countDatagram   = 'Q'
	echoDatagram    = 'E'

	// minDatagram is the longest header, maxDatagram the longest payload over IPv4.
	minDatagram = 1 + 3*8
	maxDatagram = 65507

	// datagramWindow is how many datagrams of a flow may be on the way, and confirmEvery how many
	// arrive for one confirmation. Four flows have 96 on the way, which is less than the shortest
	// queue that a path of ours has: what is measured is what goes through, and not how a sender
	// overruns it.
	datagramWindow = 24
	confirmEvery   = 8
	// stall is how long a sender waits for a confirmation. What is on the way counts as lost then,
	// for the window alone: the receiver's count tells what was. It is longer than a busy machine
	// lets a process wait, for too short a one has the sender overrun the path.
	stall = 500 * time.Millisecond
	// quiet is between two questions for how many arrived.
	quiet = 20 * time.Millisecond
	// datagramPatience is for a question that is asked again until it is answered, each time after
	// askAgain.
	datagramPatience = 10 * time.Second
	askAgain         = 200 * time.Millisecond
	// lateAnswer is from when on an answer counts as lost.
	lateAnswer = time.Second
	// serverBuffer holds what arrives while the server waits for a CPU, as far as the kernel lets it.
	serverBuffer = 1 << 20
)

// DatagramOptions says how datagrams are sent.
type DatagramOptions struct {
	Flows    int
	Size     int // of a payload in bytes, 25 at least
	Duration time.Duration
	// Rate is of requests per second on all flows together; Datagrams has none.
	Rate float64
}

func (o DatagramOptions) validate() error {
	if o.Size < minDatagram || o.Size > maxDatagram {
		return fmt.Errorf("datagrams of %d bytes: want %d to %d", o.Size, minDatagram, maxDatagram)
	}
	return nil
}

// DatagramResult is what a number of datagrams, or of requests with their responses, came to.
type DatagramResult struct {
	Sent, Arrived uint64 // none is counted twice
	Latency              // until a response, or a confirmation, is back; of those that are
	Elapsed       time.Duration
}

// Lost is the part that did not arrive.
func (r DatagramResult) Lost() float64 { return 1 - float64(r.Arrived)/float64(r.Sent) }

// padding is what datagrams carry behind their headers.
func padding() []byte {
	p := make([]byte, maxDatagram)
	for i := range p {
		p[i] = byte(i * 7)
	}
	return p
}

// ServeDatagrams answers on conn until ctx ends, and then closes it.
func ServeDatagrams(ctx context.Context, conn *net.UDPConn) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // reading returns then
	defer stop()
	if err := conn.SetReadBuffer(serverBuffer); err != nil {
		return fmt.Errorf("enlarge the queue of datagrams: %w", err)
	}
	s := datagramServer{conn: conn, padding: padding(), tallies: make(map[uint64]*tally)}
	buffer := make([]byte, maxDatagram)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buffer)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, syscall.ECONNREFUSED) { // that is of a client that has gone
			return fmt.Errorf("read a datagram: %w", err)
		}
		s.answer(buffer[:n], from)
	}
}

type datagramServer struct {
	conn    *net.UDPConn
	padding []byte
	tallies map[uint64]*tally // by run
	out     []byte
}

// tally is what arrived of one run.
type tally struct {
	seen             recent
	arrived, changed uint64
	next             uint64 // one more than the greatest number
}

// recent remembers numbers, each until one arrives that is greater by its length.
type recent [1024]uint64

// first reports whether number was not seen before.
func (r *recent) first(number uint64) bool {
	place := &r[number%uint64(len(r))]
	if *place == number+1 {
		return false
	}
	*place = number + 1
	return true
}

// answer is best effort, as all of UDP: the client misses what is lost.
func (s *datagramServer) answer(p []byte, from netip.AddrPort) {
	switch {
	case len(p) == 0:
	case p[0] == echoDatagram:
		_, _ = s.conn.WriteToUDPAddrPort(p, from)
	case p[0] == dataDatagram && len(p) >= minDatagram:
		t := s.tally(binary.BigEndian.Uint64(p[1:]))
		if number := binary.BigEndian.Uint64(p[9:]); !t.take(number, bytes.Equal(p[minDatagram:], s.padding[minDatagram:len(p)])) {
			return
		}
		if t.arrived%confirmEvery == 0 {
			s.out = binary.BigEndian.AppendUint64(append(s.out[:0], confirmDatagram), t.next)
			s.out = append(s.out, p[17:minDatagram]...)
			_, _ = s.conn.WriteToUDPAddrPort(s.out, from)
		}
	case p[0] == countDatagram && len(p) == 9:
		t := s.tally(binary.BigEndian.Uint64(p[1:]))
		s.out = binary.BigEndian.AppendUint64(append(s.out[:0], p...), t.arrived)
		s.out = binary.BigEndian.AppendUint64(s.out, t.changed)
		_, _ = s.conn.WriteToUDPAddrPort(s.out, from)
	}
}

func (s *datagramServer) tally(run uint64) *tally {
	t := s.tallies[run]
	if t == nil {
		t = new(tally)
		s.tallies[run] = t
	}
	return t
}

// take counts a datagram, and reports whether it is the first of its number.
func (t *tally) take(number uint64, whole bool) bool {
	if !t.seen.first(number) {
		return false
	}
	t.arrived++
	if !whole {
		t.changed++
	}
	t.next = max(t.next, number+1)
	return true
}

// Datagrams sends to the server on some flows, each with as many on the way as its window allows,
// and counts those that arrived. Latency is until a confirmation is back.
func Datagrams(ctx context.Context, to netip.AddrPort, opts DatagramOptions) (DatagramResult, error) {
	r, err := datagrams(ctx, to, opts)
	if err != nil {
		return r, fmt.Errorf("send datagrams: %w", err)
	}
	return r, nil
}

func datagrams(ctx context.Context, to netip.AddrPort, opts DatagramOptions) (r DatagramResult, err error) {
	if err := opts.validate(); err != nil {
		return r, err
	}
	conns, err := dialFlows(ctx, to, opts.Flows)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, closeAll(conns)) }()
	histograms := newHistograms(len(conns))
	senders := make([]*sender, len(conns))
	start := time.Now()
	for i, conn := range conns {
		senders[i] = &sender{conn: conn, start: start, datagram: padding()[:opts.Size], latency: histograms[i]}
	}
	var sending, counting errgroup.Group
	for _, s := range senders {
		sending.Go(func() error { return s.send(start.Add(opts.Duration)) })
	}
	if err := sending.Wait(); err != nil {
		return r, err
	}
	r.Elapsed = time.Since(start)
	for _, s := range senders {
		counting.Go(s.count)
	}
	if err := counting.Wait(); err != nil {
		return r, err
	}
	for _, s := range senders {
		r.Sent += s.sent
		r.Arrived += s.arrived
	}
	r.Latency, err = summarize(histograms)
	return r, err
}

// sender is one flow of Datagrams.
type sender struct {
	conn      net.Conn
	start     time.Time
	datagram  []byte
	latency   *hdrhistogram.Histogram
	sent      uint64 // and the next one's number
	confirmed uint64 // below which none is on the way
	arrived   uint64
}

// send sends until the deadline.
func (s *sender) send(until time.Time) error {
	s.datagram[0] = dataDatagram
	_, _ = rand.Read(s.datagram[1:9]) // never fails, see crypto/rand
	for {
		now := time.Now()
		if !now.Before(until) {
			return nil
		}
		if s.sent-s.confirmed >= datagramWindow {
			wait := min(stall, until.Sub(now))
			if err := s.await(now.Add(wait)); err != nil {
				return err
			}
			continue
		}
		binary.BigEndian.PutUint64(s.datagram[9:], s.sent)
		binary.BigEndian.PutUint64(s.datagram[17:], uint64(now.Sub(s.start)))
		if _, err := s.conn.Write(s.datagram); err != nil {
			return err
		}
		s.sent++
	}
}

// await reads one confirmation.
func (s *sender) await(until time.Time) error {
	if err := s.conn.SetReadDeadline(until); err != nil {
		return err
	}
	var p [minDatagram]byte
	n, err := s.conn.Read(p[:])
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.confirmed = s.sent
		return nil
	case err != nil:
		return err
	case n != 17 || p[0] != confirmDatagram:
		return nil
	}
	s.confirmed = max(s.confirmed, min(s.sent, binary.BigEndian.Uint64(p[1:])))
	took := time.Since(s.start) - time.Duration(binary.BigEndian.Uint64(p[9:]))
	return s.latency.RecordValue(max(int64(took), int64(time.Microsecond)))
}

// count asks how many arrived, until that does not change any more.
func (s *sender) count() error {
	question := append([]byte{countDatagram}, s.datagram[1:9]...)
	before := uint64(0)
	for again := false; ; again = true {
		answer, err := Ask(s.conn, question, func(p []byte) bool { return len(p) == minDatagram && bytes.HasPrefix(p, question) }, datagramPatience)
		if err != nil {
			return fmt.Errorf("ask how many arrived: %w", err)
		}
		s.arrived = binary.BigEndian.Uint64(answer[9:])
		if changed := binary.BigEndian.Uint64(answer[17:]); changed != 0 {
			return fmt.Errorf("%d of %d datagrams arrived changed", changed, s.arrived)
		}
		if s.arrived == s.sent || again && s.arrived == before {
			return nil
		}
		before = s.arrived
		time.Sleep(quiet)
	}
}

// ExchangeDatagrams sends requests of one datagram at a fixed rate, each at its time, whatever
// became of those before it. One that leaves late because the one before it could not be sent
// counts from when it was due, as with Exchange. A response that is a second late is lost.
func ExchangeDatagrams(ctx context.Context, to netip.AddrPort, opts DatagramOptions) (DatagramResult, error) {
	r, err := exchangeDatagrams(ctx, to, opts)
	if err != nil {
		return r, fmt.Errorf("exchange datagrams: %w", err)
	}
	return r, nil
}

func exchangeDatagrams(ctx context.Context, to netip.AddrPort, opts DatagramOptions) (r DatagramResult, err error) {
	if err := opts.validate(); err != nil {
		return r, err
	}
	if opts.Rate <= 0 {
		return r, errors.New("there is no rate")
	}
	conns, err := dialFlows(ctx, to, opts.Flows)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, closeAll(conns)) }()
	histograms := newHistograms(len(conns))
	askers := make([]*asker, len(conns))
	var group errgroup.Group
	start := time.Now()
	for i, conn := range conns {
		a := &asker{conn: conn, start: start, request: padding()[:opts.Size], latency: histograms[i]}
		a.schedule.interval = time.Duration(float64(len(conns)) / opts.Rate * float64(time.Second))
		a.schedule.start = start.Add(a.schedule.interval * time.Duration(i) / time.Duration(len(conns)))
		askers[i] = a
		group.Go(func() error { return a.ask(start.Add(opts.Duration)) })
		group.Go(a.listen)
	}
	if err := group.Wait(); err != nil {
		return r, err
	}
	r.Elapsed = opts.Duration
	for _, a := range askers {
		r.Sent += a.sent.Load()
		r.Arrived += a.arrived.Load()
	}
	r.Latency, err = summarize(histograms)
	return r, err
}

// asker is one flow of ExchangeDatagrams.
type asker struct {
	conn     net.Conn
	start    time.Time
	schedule schedule
	request  []byte
	latency  *hdrhistogram.Histogram
	seen     recent

	sent    atomic.Uint64 // once all are, and not before
	arrived atomic.Uint64
}

// ask sends all requests, and bounds the wait for what is missing then.
func (a *asker) ask(until time.Time) error {
	request := bytes.Clone(a.request)
	request[0] = echoDatagram
	number := uint64(0)
	defer func() {
		a.sent.Store(number)
		patience := lateAnswer
		if a.arrived.Load() == number { // listen will see no other
			patience = 0
		}
		_ = a.conn.SetReadDeadline(time.Now().Add(patience)) // an open socket takes one
	}()
	for ; a.schedule.due().Before(until); number++ {
		from := a.schedule.wait()
		binary.BigEndian.PutUint64(request[1:], number)
		binary.BigEndian.PutUint64(request[9:], uint64(max(0, from.Sub(a.start))))
		if _, err := a.conn.Write(request); err != nil {
			return err
		}
	}
	return nil
}

// listen takes responses until all have come, or none comes any more.
func (a *asker) listen() error {
	response := make([]byte, len(a.request)+1)
	for {
		n, err := a.conn.Read(response)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		if response[0] != echoDatagram || !bytes.Equal(response[17:n], a.request[17:]) {
			return errors.New("the response is not the request")
		}
		if a.seen.first(binary.BigEndian.Uint64(response[1:])) {
			took := time.Since(a.start) - time.Duration(binary.BigEndian.Uint64(response[9:]))
			if err := a.latency.RecordValue(max(int64(took), int64(time.Microsecond))); err != nil {
				return err
			}
			if a.arrived.Add(1) == a.sent.Load() {
				return nil
			}
		}
	}
}

// HoldDatagrams makes that many flows, on each of which a datagram went there and back.
func HoldDatagrams(ctx context.Context, to netip.AddrPort, n int) (*Held, error) {
	h := &Held{what: "flows", ask: AskDatagram, open: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", to.String())
	}}
	return h, h.fill(ctx, n)
}

// dialFlows makes n flows, or none; all of them are known to reach the server.
func dialFlows(ctx context.Context, to netip.AddrPort, n int) ([]net.Conn, error) {
	held, err := HoldDatagrams(ctx, to, n)
	if err != nil {
		return nil, err
	}
	return held.conns, nil
}

// AskDatagram has the server send a datagram back. It asks again when it was lost.
func AskDatagram(conn net.Conn) error {
	question := append([]byte{echoDatagram}, randomBytes(63)...)
	_, err := Ask(conn, question, func(p []byte) bool { return bytes.Equal(p, question) }, datagramPatience)
	return err
}

// Ask sends question again and again until an answer to it comes, of 128 bytes at most. A closed
// port is one that nobody listens at yet.
func Ask(conn net.Conn, question []byte, isAnswer func([]byte) bool, patience time.Duration) ([]byte, error) {
	buffer := make([]byte, 128)
	for end := time.Now().Add(patience); ; {
		again := time.Now().Add(askAgain)
		if _, err := conn.Write(question); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		if err := conn.SetReadDeadline(again); err != nil {
			return nil, err
		}
		for {
			n, err := conn.Read(buffer)
			switch {
			case err == nil && isAnswer(buffer[:n]):
				return buffer[:n], conn.SetReadDeadline(time.Time{})
			case err == nil:
				continue
			case time.Now().After(end):
				return nil, fmt.Errorf("no answer within %v: %w", patience, err)
			case errors.Is(err, syscall.ECONNREFUSED):
				time.Sleep(time.Until(again))
			case !errors.Is(err, os.ErrDeadlineExceeded):
				return nil, err
			}
			break
		}
	}
}
