package h2_test

import (
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// counted is a budget that keeps its books: half of it is for growth.
type counted struct {
	limit              int64
	used, peak, shorts atomic.Int64
}

func (b *counted) Take(n int) bool { return b.take(int64(n), b.limit) }
func (b *counted) Grow(n, spare int) bool {
	return b.take(int64(n), max(0, b.limit/2-int64(spare)))
}

func (b *counted) take(n, limit int64) bool {
	for {
		used := b.used.Load()
		if used+n > limit {
			return false
		}
		if b.used.CompareAndSwap(used, used+n) {
			for peak := b.peak.Load(); used+n > peak && !b.peak.CompareAndSwap(peak, used+n); peak = b.peak.Load() {
			}
			return true
		}
	}
}
func (b *counted) Give(n int) { b.used.Add(-int64(n)) }
func (b *counted) Short()     { b.shorts.Add(1) }

func (b *counted) empty(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); b.used.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes of the budget are still taken after everything was closed", b.used.Load())
		}
	}
}

func TestUnreadStreamsStayWithinTheBudgetAndAReadOneGoesOn(t *testing.T) {
	const conns, perConn, limit = 10, 100, 8 << 20
	budget := &counted{limit: limit}
	streams, done := make(chan hbone.Stream, conns*perConn+1), make(chan struct{})
	stop := sync.OnceFunc(func() { close(done) })
	defer stop()
	accept := hbonetest.Accepting(streams, done)
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)

	var writers sync.WaitGroup
	var first *pair
	var all []hbone.Stream
	bulk := make([]byte, 64<<10)
	for range conns {
		p := newPair(t, h2.Client{}, h2.Server{Budget: budget}, accept)
		if first == nil {
			first = p
		}
		for range perConn {
			c := p.open(t)
			all = append(all, c)
			<-streams
			writers.Go(func() {
				for err := error(nil); err == nil; {
					_, err = c.Write(bulk)
				}
			})
		}
	}
	// On the same connection as 100 that are stuck, with nothing left to grow with.
	c := first.open(t)
	s := <-streams
	const size = 4 << 20
	go func() {
		_, _ = c.Write(make([]byte, size))
		_ = c.CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, s); n != size || err != nil {
		t.Errorf("read %d bytes, %v beside streams that are not read", n, err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if peak := budget.peak.Load(); peak > limit {
		t.Errorf("%d bytes were taken from a budget of %d", peak, limit)
	}
	// The rest is two ends of ten connections and of 1,000 streams.
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > limit+8<<20 {
		t.Errorf("heap has grown by %d bytes with a budget of %d", grown, limit)
	}
	for _, c := range all {
		_ = c.Close()
	}
	writers.Wait()
	stop()
	_ = s.Close()
	budget.empty(t)
}

func TestStreamsBeyondTheBudgetAreRefused(t *testing.T) {
	for _, end := range []string{"server", "client"} {
		t.Run(end, func(t *testing.T) {
			budget := &counted{limit: 64 << 10}
			client, server := h2.Client{}, h2.Server{}
			if end == "server" {
				server.Budget = budget
			} else {
				client.Budget = budget
			}
			p := newPair(t, client, server, hbonetest.Echo)
			var err error
			var open []hbone.Stream
			for err == nil && len(open) < 100 {
				var s hbone.Stream
				if s, _, err = hbonetest.Open(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"}); err == nil {
					open = append(open, s)
				}
			}
			var status *hbone.StatusError
			if !errors.Is(err, hbone.ErrNoBuffers) && !(errors.As(err, &status) && status.Status == 503) {
				t.Errorf("stream %d: %v, want a refusal", len(open), err)
			}
			if budget.shorts.Load() == 0 {
				t.Error("nobody was told")
			}
			hbonetest.Write(t, open[0], "still here")
			hbonetest.Read(t, open[0], "still here")
			for _, s := range open {
				_ = s.Close()
			}
			budget.empty(t)
			_ = p.open(t).Close()
		})
	}
}

// rawPeer is a client that keeps the rules, frame by frame.
type rawPeer struct {
	*http2.Framer
	stream, conn int // windows
	granted      int // the largest window of the stream
}

func newRawPeer(t *testing.T, server h2.Server, handler func(*hbone.ServerRequest)) *rawPeer {
	t.Helper()
	a, b := hbonetest.TCPPair(t)
	ca := hbonetest.NewCA(t)
	ct, st := hbonetest.Handshake(t, a, b, ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID), ca.ServerTLS(t, hbonetest.ServerID))
	done := make(chan error, 1)
	go func() { done <- server.ServeConn(t.Context(), t.Context(), st, handler) }()
	t.Cleanup(func() {
		_ = ct.NetConn().Close()
		if err := <-done; err != nil {
			t.Log("served:", err) // the peer hung up, which may be one
		}
	})
	_, _ = io.WriteString(ct, http2.ClientPreface)
	p := &rawPeer{Framer: http2.NewFramer(ct, ct), conn: 65535}
	_ = p.WriteSettings()
	var block []byte
	for _, f := range []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "10.0.0.1:80"}} {
		block = append(append(append(block, 0x00, byte(len(f.Name))), f.Name...), byte(len(f.Value)))
		block = append(block, f.Value...)
	}
	_ = p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
	return p
}

// next takes in a frame.
func (p *rawPeer) next(t *testing.T) http2.Frame {
	t.Helper()
	frame, err := p.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	switch f := frame.(type) {
	case *http2.SettingsFrame:
		if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
			p.stream += int(v)
			_ = p.WriteSettingsAck()
		}
	case *http2.WindowUpdateFrame:
		if f.StreamID == 0 {
			p.conn += int(f.Increment)
		} else {
			p.stream += int(f.Increment)
			p.granted = max(p.granted, p.stream)
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			_ = p.WritePing(true, f.Data)
		}
	}
	return frame
}

// send uses all of the window.
func (p *rawPeer) send(t *testing.T) {
	t.Helper()
	for n := min(p.stream, p.conn); n > 0; n = min(p.stream, p.conn) {
		n = min(n, 16<<10)
		if err := p.WriteData(1, false, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		p.stream -= n
		p.conn -= n
	}
}

// grow sends until the window has its full size. The peer always uses its window up before it
// answers a PING, so the window is what limits it.
func (p *rawPeer) grow(t *testing.T, budget *counted) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); budget.used.Load() < 4<<20; p.next(t) {
		if p.send(t); time.Now().After(deadline) {
			t.Fatalf("window has grown to %d only", p.granted)
		}
	}
}

func discard(r *hbone.ServerRequest) {
	if s, err := r.Accept(hbone.Response{}); err == nil {
		_, _ = io.Copy(io.Discard, s)
	}
}

func TestWindowGrowsToItsFullSizeUnderBulk(t *testing.T) {
	budget := &counted{limit: 128 << 20}
	p := newRawPeer(t, h2.Server{Budget: budget}, discard)
	p.grow(t, budget)
	if peak := budget.peak.Load(); peak > 5<<20 {
		t.Errorf("one stream took %d bytes", peak)
	}
	_ = p.WriteRSTStream(1, http2.ErrCodeCancel)
	budget.empty(t)
}

func TestWindowOfAStreamThatNobodyReadsDoesNotGrow(t *testing.T) {
	budget := &counted{limit: 128 << 20}
	p := newRawPeer(t, h2.Server{Budget: budget}, func(r *hbone.ServerRequest) {
		if _, err := r.Accept(hbone.Response{}); err == nil {
			<-r.Context.Done()
		}
	})
	for p.granted == 0 {
		p.next(t)
	}
	sent := p.granted
	p.send(t)
	_ = p.WritePing(false, [8]byte{1})
	for {
		if f, ok := p.next(t).(*http2.PingFrame); ok && f.IsAck() && f.Data == [8]byte{1} {
			break
		}
	}
	if p.stream != 0 {
		t.Errorf("%d bytes more may be sent to a stream that holds %d unread", p.stream, sent)
	}
	if used := budget.used.Load(); used < int64(sent) || used > 2*int64(sent) {
		t.Errorf("%d bytes are taken for %d", used, sent)
	}
	_ = p.WriteRSTStream(1, http2.ErrCodeCancel)
	budget.empty(t)
}

func TestDataSentBeforeSettingsWereSeenIsTaken(t *testing.T) {
	budget := &counted{limit: 1 << 20}
	got := make(chan int64, 1)
	p := newRawPeer(t, h2.Server{Budget: budget}, func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			return
		}
		n, _ := io.Copy(io.Discard, s)
		got <- n
	})
	for range 3 { // of RFC 9113's initial window of 65,535
		_ = p.WriteData(1, false, make([]byte, 16<<10))
	}
	_ = p.WriteData(1, true, nil)
	if n := <-got; n != 48<<10 {
		t.Errorf("read %d bytes", n)
	}
	budget.empty(t)
}

func TestBudgetReturnsToZeroWhateverHappens(t *testing.T) {
	for seed := range uint64(12) {
		budget := &counted{limit: 4 << 20}
		random := rand.New(rand.NewPCG(seed, 1))
		var handlers atomic.Uint64
		p := newPair(t, h2.Client{Budget: budget}, h2.Server{Budget: budget}, func(r *hbone.ServerRequest) {
			misbehave(r, rand.New(rand.NewPCG(seed, 2+handlers.Add(1))))
		})
		var users sync.WaitGroup
		for range 40 {
			mine := rand.New(rand.NewPCG(random.Uint64(), 3))
			users.Go(func() {
				s, _, err := hbonetest.Open(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"})
				if err != nil {
					return
				}
				use(s, mine)
			})
		}
		switch seed % 4 {
		case 0: // while all runs
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
			_ = p.session.Close()
		case 1:
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
			p.force()
		case 2:
			p.drain()
		}
		users.Wait()
		_ = p.session.Close()
		<-p.session.Done()
		budget.empty(t)
		if peak := budget.peak.Load(); peak > budget.limit {
			t.Errorf("%d bytes were taken from a budget of %d", peak, budget.limit)
		}
	}
}

func misbehave(r *hbone.ServerRequest, random *rand.Rand) {
	switch random.IntN(6) {
	case 0:
		r.Reject(503)
		return
	case 1:
		return
	}
	if s, err := r.Accept(hbone.Response{}); err == nil {
		use(s, random)
	}
}

// use reads and writes for a while, and leaves the stream in one of many states.
func use(s hbone.Stream, random *rand.Rand) {
	time.AfterFunc(time.Duration(random.IntN(100))*time.Millisecond, func() { _ = s.Close() })
	var both sync.WaitGroup
	writes, reads := random.IntN(60), random.IntN(100)
	size, end := 1+random.IntN(100_000), random.IntN(2) == 0
	both.Go(func() {
		for range writes {
			if _, err := s.Write(make([]byte, size)); err != nil {
				return
			}
		}
		if end {
			_ = s.CloseWrite()
		}
	})
	both.Go(func() {
		buf := make([]byte, 1+size/2)
		for range reads {
			if _, err := s.Read(buf); err != nil {
				return
			}
		}
	})
	both.Wait()
	_ = s.Close()
}

// Whatever it says: its receiver makes room for all of it at once.
func TestLargeFrameComesOutOfTheBudget(t *testing.T) {
	const size = 100 << 10
	budget := &counted{limit: 1 << 20}
	p := newRawPeer(t, h2.Server{Budget: budget}, discard)
	if err := p.WriteRawFrame(0xfb, 0, 0, make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	_ = p.WritePing(false, [8]byte{1})
	for {
		if f, ok := p.next(t).(*http2.PingFrame); ok && f.IsAck() {
			break
		}
	}
	if peak := budget.peak.Load(); peak < size {
		t.Errorf("%d bytes were taken for a frame of %d", peak, size)
	}
	_ = p.WriteRSTStream(1, http2.ErrCodeCancel)
	budget.empty(t)

	budget = &counted{limit: 4000} // too little for a stream as well
	p = newRawPeer(t, h2.Server{Budget: budget}, discard)
	if err := p.WriteRawFrame(0xfb, 0, 0, make([]byte, 5000)); err != nil {
		t.Fatal(err)
	}
	for {
		if f, ok := p.next(t).(*http2.GoAwayFrame); ok {
			if f.ErrCode != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("ended with %v", f.ErrCode)
			}
			break
		}
	}
	if n := budget.shorts.Load(); n != 2 {
		t.Errorf("a stream and a frame were refused, and %d were told of", n)
	}
	budget.empty(t)
}
