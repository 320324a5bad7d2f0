package kernel_test

import (
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

func TestOlderConnectionsGoOnThroughTheGuard(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		type pair struct{ inside, outside net.Conn }
		var older []pair
		for _, fam := range families() {
			atDB, atWeb := netip.AddrPortFrom(fam.of(f.db), 3306), netip.AddrPortFrom(fam.of(f.web), 8080)
			db := listenOn(t, f.db, atDB)
			web := listenOn(t, f.web, atWeb)
			out := dial(t, f.web.Namespace, atDB)
			older = append(older, pair{out, accept(t, db)})
			in := dial(t, f.db.Namespace, atWeb)
			older = append(older, pair{accept(t, web), in})
		}
		f.enrol(t)
		if got := f.pod.Bypassing(); got != len(older) {
			t.Errorf("%d connections bypass, want %d", got, len(older))
		}
		for _, p := range older {
			send(t, p.inside, p.outside, "from the pod")
			send(t, p.outside, p.inside, "to the pod")
		}
		// What is captured now is none of them.
		captured := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		accept(t, f.pod.Outbound())
		if err := f.pod.Prune(); err != nil {
			t.Fatal(err)
		}
		if got := f.pod.Bypassing(); got != len(older) {
			t.Errorf("%d connections bypass after Prune, want %d", got, len(older))
		}
		_ = captured.Close()

		ended := older[0]
		local, remote := addrPort(ended.inside.LocalAddr()), addrPort(ended.inside.RemoteAddr())
		_ = ended.inside.(*net.TCPConn).SetLinger(0)
		_ = ended.inside.Close()
		if err := f.pod.Prune(); err != nil {
			t.Fatal(err)
		}
		if got := f.pod.Bypassing(); got != len(older)-1 {
			t.Errorf("%d connections bypass after one ended, want %d", got, len(older)-1)
		}
		w := newWire(t, f.node, f.web, f.db)
		w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(w.ip4(layers.IPProtocolTCP)), &layers.TCP{
			SrcPort: layers.TCPPort(local.Port()), DstPort: layers.TCPPort(remote.Port()), DataOffset: 5, ACK: true,
		}, gopacket.Payload(nonce))
		if w.arrives(t, nonce) {
			t.Error("a segment with the addresses of an ended connection got out")
		}
		send(t, older[1].inside, older[1].outside, "still there")
	})
}

// A second Guard must not take what was forged since for an older connection.
func TestGuardAgainAdmitsNothingNew(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		app := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		accept(t, f.pod.Outbound())
		setMark(t, app, 0)
		if err := f.pod.Guard(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := f.pod.Bypassing(); got != 0 {
			t.Errorf("%d connections bypass", got)
		}
		if err := f.pod.Unguard(); err != nil {
			t.Fatal(err)
		}
	})
}
