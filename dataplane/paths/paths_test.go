package paths

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var peerAddr = netip.MustParseAddr("10.0.0.1")

func TestQualityIsBadWhenWaitingIsDear(t *testing.T) {
	for _, c := range []struct {
		name string
		q    Quality
		bad  bool
	}{
		{"nothing is known", Quality{}, false},
		{"nothing is lost", Quality{Segments: 1e6, RTT: time.Second}, false},
		{"too little was sent", Quality{Segments: 999, Lost: 500, RTT: time.Second}, false},
		{"one loss may be chance", Quality{Segments: 1000, Lost: 1, RTT: time.Second}, false},
		{"a short way", Quality{Segments: 10_000, Lost: 10, RTT: 900 * time.Microsecond}, false},
		{"the same loss on a longer one", Quality{Segments: 10_000, Lost: 10, RTT: 20 * time.Millisecond}, true},
		{"all is lost", Quality{Segments: 2000, Lost: 2000, RTT: time.Millisecond}, true},
	} {
		if got := c.q.Bad(); got != c.bad {
			t.Errorf("%s: %v is bad: %v, want %v", c.name, c.q, got, c.bad)
		}
	}
}

func TestQualityIsReadAsItWasWritten(t *testing.T) {
	want := Quality{Segments: 4312, Lost: 12, RTT: 23 * time.Millisecond}
	if got, err := Parse(want.String()); got != want || err != nil {
		t.Errorf("Parse(%q) = %v, %v", want.String(), got, err)
	}
	for _, text := range []string{
		"", "lost", "lost=1, sent=2", "lost=3, sent=2, rtt=1ms", "lost=-1, sent=2, rtt=1ms", "lost=1, sent=99999999999, rtt=1ms",
		"lost=1, sent=2, rtt=-1ms", "lost=1, sent=2, rtt=2h", "lost=1, sent=2, rtt=soon", strings.Repeat("lost=1", 1000),
	} {
		if q, err := Parse(text); err == nil || len(err.Error()) > 200 || q != (Quality{}) {
			t.Errorf("Parse(%.20q) = %v, %v", text, q, err)
		}
	}
}

func TestLossesOfAFullLineDoNotCount(t *testing.T) {
	before := counts{segments: 1000, lost: 1, bytes: 1_000_000, busy: time.Second}
	for _, c := range []struct {
		bytes uint64
		busy  time.Duration
		fast  bool
	}{
		{bytes: 0, busy: 0},
		{bytes: 9_000_000, busy: time.Second},
		{bytes: 11_000_000, busy: time.Second, fast: true},
		{bytes: 11_000_000, busy: 2 * time.Second},
	} {
		now := counts{segments: 9000, lost: 50, bytes: before.bytes + c.bytes, busy: before.busy + c.busy}
		if got := now.fast(before); got != c.fast {
			t.Errorf("%d bytes in %v are fast: %v", c.bytes, c.busy, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("lost=12, sent=4312, rtt=23ms")
	f.Add("lost=1, sent=0, rtt=-5ns")
	f.Fuzz(func(t *testing.T, text string) {
		q, err := Parse(text)
		if err != nil {
			return
		}
		if q.Loss() < 0 || q.Loss() > 1 || q.Blocking() < 0 {
			t.Errorf("%q is %v", text, q)
		}
	})
}

// A bad way stays so for a while, is found out anew, and for twice as long when it is bad again.
func TestBadWayIsLookedAtAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j Judge
		if bad, _ := j.Bad(peerAddr); bad {
			t.Fatal("an unknown way is bad")
		}
		lossy := Quality{Segments: 2000, Lost: 40, RTT: 20 * time.Millisecond}
		for _, hold := range []time.Duration{minHold, 2 * minHold, 4 * minHold} {
			j.Hear(peerAddr, lossy)
			for _, at := range []time.Duration{0, hold - time.Second} {
				time.Sleep(at)
				if bad, q := j.Bad(peerAddr); !bad || q != lossy {
					t.Errorf("after %v of %v it is %v, by %v", at, hold, bad, q)
				}
			}
			time.Sleep(2 * time.Second)
			if bad, _ := j.Bad(peerAddr); bad {
				t.Errorf("after %v it is bad by what was known before", hold)
			}
		}
	})
}

// What connections sent counts once, however often it is looked at, and closed ones are forgotten.
func TestConnectionsTellOfTheWay(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const messages = 20
	for range messages {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	var j Judge
	for range 3 {
		j.Watch(peerAddr, conn.(*net.TCPConn))
	}
	q := j.Ours(peerAddr)
	if q.Segments != messages || q.Lost != 0 || q.RTT <= 0 {
		t.Errorf("%d messages were %v", messages, q)
	}
	if again := j.Ours(peerAddr); again != q {
		t.Errorf("looked at again it is %v, was %v", again, q)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	j.peers[peerAddr].watched[0].looked = time.Time{}
	if j.Ours(peerAddr); len(j.peers[peerAddr].watched) != 0 {
		t.Error("a closed connection is still watched")
	}
	for range 2 * maxWatched {
		j.Watch(peerAddr, &net.TCPConn{})
	}
	if n := len(j.peers[peerAddr].watched); n > maxWatched {
		t.Errorf("%d connections are watched, want %d at most", n, maxWatched)
	}
}
