package link

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestScheduleDelaysByDelayAndRate(t *testing.T) {
	now := time.Now()
	s := newSchedule(Path{Delay: 10 * time.Millisecond, Rate: 8_000_000, Queue: 2 * time.Millisecond}) // a byte in a microsecond
	for i, want := range []time.Duration{1, 2, 3} {
		if at, fate := s.admit(now, 1000); fate != carried || at.Sub(now) != want*time.Millisecond+10*time.Millisecond {
			t.Errorf("packet %d arrives after %v, %v", i, at.Sub(now), fate)
		}
	}
	if _, fate := s.admit(now, 1000); fate != overflow {
		t.Errorf("a packet that waits 3 ms for the line: %v, want overflow", fate)
	}
	now = now.Add(5 * time.Millisecond)
	if at, fate := s.admit(now, 500); fate != carried || at.Sub(now) != 10500*time.Microsecond {
		t.Errorf("on an idle line: %v, %v", at.Sub(now), fate)
	}
}

func TestScheduleLosesAndReordersItsShare(t *testing.T) {
	fates := func(seed uint64) (all []time.Duration, losses int) {
		s := newSchedule(Path{Delay: time.Millisecond, Loss: 0.03, Reorder: 0.1, Seed: seed})
		now := time.Now()
		for range 10_000 {
			at, fate := s.admit(now, 100)
			if fate == lost {
				losses++
				all = append(all, -1)
				continue
			}
			all = append(all, at.Sub(now))
		}
		return all, losses
	}
	first, losses := fates(1)
	again, _ := fates(1)
	other, _ := fates(2)
	if !slices.Equal(first, again) || slices.Equal(first, other) {
		t.Error("the fates do not go by the seed")
	}
	early := 0
	for _, d := range first {
		if d == 0 {
			early++
		}
	}
	if losses < 200 || losses > 400 || early < 800 || early > 1200 {
		t.Errorf("of 10,000 packets %d are lost and %d overtake; want 3 %% and 10 %%", losses, early)
	}
}

func TestPathsThatMakeNoSense(t *testing.T) {
	for _, p := range []Path{{Loss: 1.1}, {Loss: -1}, {Reorder: 2}, {Delay: -1}, {Rate: -1}, {Queue: -1}} {
		if p.Validate() == nil {
			t.Errorf("%+v is valid", p)
		}
	}
}

// connect makes two namespaces and a link between them.
func connect(t testing.TB, there, back Path) (*Link, *netns.Namespace, *netns.Namespace) {
	t.Helper()
	netnstest.Require(t)
	a, b := netnstest.New(t), netnstest.New(t)
	l, err := New(a, b, there, back)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, a, b
}

func listen(t testing.TB, ns *netns.Namespace, addr netip.Addr) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	netnstest.Do(t, ns, func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// numbered sends n datagrams one way, each when the one before was sent, and returns those that
// came within a second of the last.
func numbered(t *testing.T, from, to *net.UDPConn, n int) []uint32 {
	t.Helper()
	target := to.LocalAddr().(*net.UDPAddr).AddrPort()
	if err := to.SetReadBuffer(8 << 20); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if _, err := from.WriteToUDPAddrPort(binary.BigEndian.AppendUint32(nil, uint32(i)), target); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Microsecond) // the device's queue is a thousand
	}
	var got []uint32
	for buf := make([]byte, 16); ; {
		_ = to.SetReadDeadline(time.Now().Add(time.Second))
		m, err := to.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return got
		}
		if err != nil || m != 4 {
			t.Fatalf("read %d bytes, %v", m, err)
		}
		got = append(got, binary.BigEndian.Uint32(buf))
	}
}

func TestLinkCarriesAllInOrder(t *testing.T) {
	l, a, b := connect(t, Path{Delay: 5 * time.Millisecond}, Path{})
	for i := range 2 {
		got := numbered(t, listen(t, a, l.A.Addrs()[i]), listen(t, b, l.B.Addrs()[i]), 500)
		if len(got) != 500 || !slices.IsSorted(got) {
			t.Errorf("to %v: %d of 500 datagrams came, in order: %v", l.B.Addrs()[i], len(got), slices.IsSorted(got))
		}
	}
}

func TestLinkLosesOneWayOnly(t *testing.T) {
	l, a, b := connect(t, Path{Loss: 1}, Path{})
	x, y := listen(t, a, l.A.V4), listen(t, b, l.B.V4)
	if got := numbered(t, x, y, 100); len(got) != 0 {
		t.Errorf("%d datagrams came by a way that loses all", len(got))
	}
	if got := numbered(t, y, x, 100); len(got) != 100 {
		t.Errorf("%d of 100 datagrams came back", len(got))
	}
	if there, back := l.Stats(); there.Lost < 100 || there.Carried != 0 || back.Carried < 100 || back.Lost != 0 {
		t.Errorf("stats = %+v, %+v", there, back)
	}
}

func TestLinkReorders(t *testing.T) {
	l, a, b := connect(t, Path{Delay: 20 * time.Millisecond, Reorder: 0.2}, Path{})
	got := numbered(t, listen(t, a, l.A.V4), listen(t, b, l.B.V4), 500)
	if len(got) != 500 || slices.IsSorted(got) {
		t.Errorf("%d of 500 datagrams came, in order: %v", len(got), slices.IsSorted(got))
	}
}
