package kernel_test

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// BenchmarkUDPRoundTrip is a question of 64 bytes and its answer: untouched, to others than
// peers while UDP is captured, and to a peer, whom the agent itself stands in for here.
func BenchmarkUDPRoundTrip(b *testing.B) {
	netnstest.Require(b)
	ask := func(b *testing.B, f *fixture, to netip.AddrPort) {
		b.Helper()
		app := dialUDP(b, f.web.Namespace, to)
		buf := make([]byte, 64)
		for b.Loop() {
			if _, err := app.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := app.Read(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("untouched", func(b *testing.B) {
		f := enrolled(b, udpModes()[0])
		ask(b, f, echoUDP(b, f.db))
	})
	b.Run("to others", func(b *testing.B) {
		f := enrolled(b, udpModes()[0])
		f.captureUDP(b, kernel.UDPConfig{})
		ask(b, f, echoUDP(b, f.db))
	})
	b.Run("captured", func(b *testing.B) {
		f := withUDP(b, udpModes()[0], kernel.UDPConfig{})
		d := f.pod.Datagrams()
		done := make(chan struct{})
		go func() {
			defer close(done)
			buf := make([]byte, 65536)
			for {
				n, from, err := d.Receive(buf)
				if err != nil || d.Deliver(from.To, from.From, buf[:n]) != nil {
					return
				}
			}
		}()
		ask(b, f, at(f.db.V4, 9))
		if err := f.pod.ReleaseUDP(); err != nil {
			b.Fatal(err)
		}
		<-done
	})
}

// echoUDP answers what it is sent, until the test ends.
func echoUDP(b *testing.B, p *netnstest.Pod) netip.AddrPort {
	b.Helper()
	conn := bindUDP(b, p.Namespace, at(p.V4, 0))
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				b.Error(err)
				return
			}
			_, _ = conn.WriteToUDPAddrPort(buf[:n], from) // the client may have gone
		}
	}()
	b.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	return localOf(conn)
}

// What it takes to capture a pod's UDP, which every enrolment does.
func BenchmarkCaptureUDP(b *testing.B) {
	netnstest.Require(b)
	f := enrolled(b, udpModes()[0])
	for b.Loop() {
		f.captureUDP(b, kernel.UDPConfig{})
		b.StopTimer()
		if err := f.pod.ReleaseUDP(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
