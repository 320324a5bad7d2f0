package h2_test

import (
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func TestTransferIsByteExactInRandomChunks(t *testing.T) {
	const size, streams = 64 << 20, 4
	p := newPair(t, h2.Client{}, h2.Server{}, hbonetest.Echo)
	var wg sync.WaitGroup
	for i := range streams {
		s := p.open(t)
		seed := [32]byte{byte(i)}
		sent, got := sha256.New(), sha256.New()
		wg.Go(func() {
			random, sizes := rand.NewChaCha8(seed), rand.New(rand.NewPCG(1, uint64(i)))
			for left := size / streams; left > 0; {
				buf := make([]byte, min(left, 1+sizes.IntN(200_000)))
				_, _ = random.Read(buf)
				sent.Write(buf)
				if _, err := s.Write(buf); err != nil {
					t.Error(err)
					return
				}
				left -= len(buf)
			}
			if err := s.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			sizes := rand.New(rand.NewPCG(2, uint64(i)))
			buf := make([]byte, 300_000)
			n := 0
			for {
				m, err := s.Read(buf[:1+sizes.IntN(len(buf))])
				got.Write(buf[:m])
				n += m
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
			if n != size/streams {
				t.Errorf("echoed %d bytes, want %d", n, size/streams)
			}
		})
		defer func() {
			if string(sent.Sum(nil)) != string(got.Sum(nil)) {
				t.Errorf("stream %d: bytes differ", i)
			}
		}()
	}
	wg.Wait()
}

func TestSlowReaderIsBoundByTheWindow(t *testing.T) {
	const window = 64 << 10 // of a new stream, whatever it might grow to
	streams, done := make(chan hbone.Stream, 1), make(chan struct{})
	defer close(done)
	p := newPair(t, h2.Client{}, h2.Server{StreamWindow: 256 << 10}, hbonetest.Accepting(streams, done))
	c := p.open(t)
	s := <-streams
	var sent int
	blocked := make(chan struct{})
	go func() {
		defer close(blocked)
		for {
			n, err := c.Write(make([]byte, 64<<10))
			sent += n
			if err != nil {
				return
			}
		}
	}()
	time.Sleep(200 * time.Millisecond)
	_ = c.Close()
	<-blocked
	if sent > window {
		t.Errorf("%d bytes were taken from a writer whose peer reads nothing, want at most the window of %d", sent, window)
	}
	if sent < 16<<10 {
		t.Errorf("only %d bytes were taken before anybody read", sent)
	}
	_ = s.Close()
}

func TestSlowReaderOfTinyFramesHoldsBoundedMemory(t *testing.T) {
	const tiny = 30_000
	c, s, _ := both(t)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range tiny { // a new stream's window has room for them
		hbonetest.Write(t, c, "x")
	}
	_ = c.CloseWrite()
	time.Sleep(50 * time.Millisecond)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 2<<20 {
		t.Errorf("%d frames of one byte hold %d bytes of memory", tiny, grown)
	}
	if all, err := io.ReadAll(s); err != nil || len(all) != tiny {
		t.Errorf("read %d bytes, %v", len(all), err)
	}
}

func TestBlockedStreamDoesNotBlockOthers(t *testing.T) {
	streams, done := make(chan hbone.Stream, 2), make(chan struct{})
	defer close(done)
	p := newPair(t, h2.Client{}, h2.Server{}, hbonetest.Accepting(streams, done))
	stuck := p.open(t)
	<-streams
	go func() {
		for {
			if _, err := stuck.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	time.Sleep(100 * time.Millisecond)
	c := p.open(t)
	s := <-streams
	hbonetest.Write(t, c, "hello")
	hbonetest.Read(t, s, "hello")
	hbonetest.Write(t, s, "hello")
	hbonetest.Read(t, c, "hello")
	_ = stuck.Close()
}

func TestDrainLetsStreamsRunAndRefusesNewOnes(t *testing.T) {
	c, s, p := both(t)
	p.drain()
	for deadline := time.Now().Add(5 * time.Second); p.session.Capacity() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("session still takes streams")
		}
	}
	if _, _, err := hbonetest.Open(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"}); !errors.Is(err, hbone.ErrRefused) {
		t.Errorf("Open = %v, want ErrRefused", err)
	}
	hbonetest.Write(t, c, "going on")
	hbonetest.Read(t, s, "going on")
	_ = c.CloseWrite()
	hbonetest.ReadEOF(t, s)
	hbonetest.Write(t, s, "bye")
	_ = s.CloseWrite()
	hbonetest.Read(t, c, "bye")
	hbonetest.ReadEOF(t, c)
	<-p.session.Done()
}

func TestDrainOfAnIdleConnectionEndsIt(t *testing.T) {
	p := newPair(t, h2.Client{}, h2.Server{}, hbonetest.Echo)
	s := p.open(t)
	_ = s.CloseWrite()
	hbonetest.ReadEOF(t, s)
	p.drain()
	if err := <-p.served; err != nil {
		t.Errorf("ServeConn = %v", err)
	}
	p.served <- nil
	<-p.session.Done()
}

func TestForceCutsStreams(t *testing.T) {
	c, s, p := both(t)
	p.drain()
	p.force()
	for _, end := range []hbone.Stream{c, s} {
		if _, err := io.ReadAll(end); err == nil {
			t.Error("a cut stream ended cleanly")
		}
	}
}

func TestLostConnectionIsNoCleanEnd(t *testing.T) {
	a, b := hbonetest.TCPPair(t)
	streams, done := make(chan hbone.Stream, 1), make(chan struct{})
	defer close(done)
	p := newPairOn(t, a, b, h2.Client{}, h2.Server{}, hbonetest.Accepting(streams, done))
	c := p.open(t)
	s := <-streams
	hbonetest.Write(t, s, "part")
	hbonetest.Read(t, c, "part")
	_ = b.Close()
	for _, end := range []hbone.Stream{c, s} {
		if _, err := end.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("Read = %v", err)
		}
	}
	<-p.session.Done()
	if _, _, err := hbonetest.Open(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"}); !errors.Is(err, hbone.ErrRefused) {
		t.Errorf("Open on a dead session = %v, want ErrRefused", err)
	}
}

func TestReservationsCount(t *testing.T) {
	p := newPair(t, h2.Client{}, h2.Server{MaxStreams: 3}, hbonetest.Echo)
	_ = p.open(t).Close() // the server's SETTINGS are here
	hbonetest.WaitStreams(t, p.session, 0)
	for i := range 3 {
		if !p.session.Reserve() {
			t.Fatalf("reservation %d was refused", i)
		}
	}
	if p.session.Reserve() {
		t.Error("a fourth place of three was reserved")
	}
	p.session.Release()
	if !p.session.Reserve() {
		t.Error("a place given back was not there")
	}
	s := p.open(t)
	if got := p.session.Capacity(); got != 0 {
		t.Errorf("capacity = %d with two reserved and one open of three", got)
	}
	_ = s.Close()
	if got := p.session.Capacity(); got != 1 {
		t.Errorf("capacity = %d after a stream ended, want 1", got)
	}
}

func TestAbandonedBytesGiveTheConnectionsWindowBack(t *testing.T) {
	p := newPair(t, h2.Client{ConnWindow: 1 << 20, StreamWindow: 256 << 10}, h2.Server{}, func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			return
		}
		for err == nil {
			_, err = s.Write(make([]byte, 64<<10))
		}
	})
	for range 40 { // ten times the connection's window
		s := p.open(t)
		time.Sleep(2 * time.Millisecond)
		_ = s.Close()
	}
	s := p.open(t)
	timer := time.AfterFunc(10*time.Second, func() { _ = s.Close() })
	defer timer.Stop()
	if _, err := io.CopyN(io.Discard, s, 4<<20); err != nil {
		t.Errorf("after 40 abandoned streams: %v", err)
	}
	_ = s.Close()
}
