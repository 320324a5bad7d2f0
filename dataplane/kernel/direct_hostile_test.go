package kernel_test

import (
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// An admitted connection is let by, and nothing that looks like it or was once.
func TestGuardsPassTheAdmittedConnectionAlone(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newDirect(t, m)
		to, l := f.serve(t, f.db.V4)
		client, server := f.pair(t, l, to)
		send(t, client, server, "hello")
		from := addrPort(client.LocalAddr())
		web, db := newWire(t, f.node, f.web, f.db), newWire(t, f.node, f.db, f.web)
		web.seq, db.seq = 1000, 2000 // ICMP brings sentinels back: nobody takes them for their own
		if web.says(t, from, to, ack) || web.says(t, from, to, syn) {
			t.Error("a raw socket of the client's pod speaks for the client's socket")
		}
		if !db.says(t, to, from, ack) {
			t.Error("the server's pod is not let by: its packets need no socket, as when they are sent again")
		}
		if db.says(t, to, from, syn) {
			t.Error("the server's pod opens a connection to the client's port")
		}
		for _, other := range []netip.AddrPort{at(from.Addr(), from.Port()-1), at(from.Addr(), from.Port()+1)} {
			if web.says(t, other, to, syn) || web.says(t, other, to, ack) {
				t.Errorf("what looks like a connection from %s got out", other)
			}
		}
		if web.says(t, from, at(to.Addr(), 8081), ack) || db.says(t, at(to.Addr(), 8081), from, ack) {
			t.Error("the tuple of a connection is good for another port of the server")
		}
	})
}

func TestTupleOfAnEndedConnectionIsNobodysPass(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newDirect(t, m)
		to, l := f.serve(t, f.db.V4)
		client, server := f.pair(t, l, to)
		send(t, client, server, "hello")
		from := addrPort(client.LocalAddr())
		abort(t, client)
		f.events.next(t, from, kernel.DirectClosed)
		_ = server.Close()
		w := newWire(t, f.node, f.web, f.db)
		if w.says(t, from, to, syn) || w.says(t, from, to, ack) {
			t.Error("the client's tuple is let by after its end")
		}
		before := f.counter(t, "steer", "direct") + f.counter(t, "ingress", "direct")
		// Another pod, which nothing guards, plays the client: it is plaintext like any other.
		forged := newWire(t, f.node, f.other, f.db)
		forged.says(t, from, to, syn)
		if after := f.counter(t, "steer", "direct") + f.counter(t, "ingress", "direct"); after != before {
			t.Error("a SYN with the tuple of a connection that has ended was left to the application")
		}
	})
}

// What is chosen at connect() counts only if it still does when the SYN goes, and the address
// is still that of the pod which was judged.
func TestConnectionIsTheAgentsWhenItsVerdictLapses(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	for _, fam := range families() {
		t.Run(fam.name, func(t *testing.T) {
			to, _ := f.serve(t, fam.of(f.db))
			homes := f.layoutMap(t, "homes")
			before := f.counter(t, "direct", "proxied_revoked")
			if err := homes.Put(kernel.ToAddr(to.Addr()), uint64(1)); err != nil {
				t.Fatal(err)
			}
			client := dial(t, f.web.Namespace, to)
			agents := accept(t, f.pod.Outbound())
			send(t, client, agents, "for the agent")
			if f.counter(t, "direct", "proxied_revoked") == before {
				t.Error("nothing was revoked")
			}
			if n := f.admissions(t); n != 0 {
				t.Errorf("%d connections are admitted", n)
			}
		})
	}
}

func (f *fixture) layoutMap(t testing.TB, name string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(pinDir(f)+"/layout-"+bpf.Layout()+"/"+name, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func (f *fixture) admissions(t testing.TB) (n int) {
	t.Helper()
	var key bpf.RacewayTuple
	var value bpf.RacewayAdmission
	entries := f.shared(t, "admitted").Iterate()
	for entries.Next(&key, &value) {
		if value.Stage != bpf.RacewayAdmissionStageADMISSION_ENDED {
			n++
		}
	}
	if err := entries.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// A NetworkPolicy may let the tunnel's port through and not the application's.
func TestConnectionIsTheAgentsWhenItsSYNDoesNotArrive(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, _ := f.serve(t, f.db.V4)
	netnstest.Do(t, f.node.Namespace, func() error {
		return exec.Command("ip", "route", "replace", "blackhole", f.db.V4.String()+"/32", "table", "main", "metric", "0").Run()
	})
	client := dial(t, f.web.Namespace, to)
	agents := accept(t, f.pod.Outbound())
	send(t, client, agents, "by the second SYN")
	c := f.events.next(t, addrPort(client.LocalAddr()), kernel.DirectUnanswered)
	if c.Arrived {
		t.Errorf("unanswered: %+v", c)
	}
	if n := f.admissions(t); n != 0 {
		t.Errorf("%d connections are admitted", n)
	}
}

// An address that is another pod's by now gets no data: the SYN was not seen where the
// verdict says.
func TestNoDataGoesToAPodThatTookTheAddress(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to := at(f.db.V4, 8080)
	f.allow(t, to, 1, to)
	netnstest.Do(t, f.other.Namespace, func() error {
		return exec.Command("ip", "address", "add", to.Addr().String()+"/32", "dev", "lo").Run()
	})
	l := listenOn(t, f.other, to)
	netnstest.Do(t, f.node.Namespace, func() error {
		return exec.Command("ip", "route", "replace", f.db.V4.String()+"/32", "via", f.other.V4.String(), "dev", f.other.HostInterface, "onlink", "metric", "0").Run()
	})
	client := dial(t, f.web.Namespace, to)
	server := accept(t, l)
	if _, err := client.Write([]byte("secret")); err != nil {
		t.Fatal(err)
	}
	_ = server.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if n, err := server.Read(make([]byte, 6)); n > 0 || !isTimeout(err) {
		t.Errorf("the other pod reads %d bytes, %v", n, err)
	}
	if f.counter(t, "guard", "dropped_payload") == 0 {
		t.Error("the guard dropped nothing")
	}
}

func TestFullMapsLeaveConnectionsToTheAgent(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, _ := f.serve(t, f.db.V4)
	m := f.shared(t, "admitted")
	n := int(m.MaxEntries())
	keys, values := make([]bpf.RacewayTuple, n), make([]bpf.RacewayAdmission, n)
	for i := range keys {
		keys[i].Zero, values[i].Stage = uint32(i+1), bpf.RacewayAdmissionStageADMISSION_ARRIVED
	}
	if _, err := m.BatchUpdate(keys, values, nil); err != nil {
		t.Fatal(err)
	}
	f.toAgent(t, to)
	if f.counter(t, "direct", "proxied_full") == 0 {
		t.Error("the map was not full")
	}
	if _, err := f.dp.Repair(); err != nil {
		t.Fatal(err)
	}
	if n := f.admissions(t); n != 0 {
		t.Errorf("%d connections without a socket are left after a repair", n)
	}
}

func TestRepairPutsTheHooksBack(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, l := f.serve(t, f.db.V4)
	for _, name := range []string{"track", "getpeername4"} {
		if err := detach(pinDir(f.fixture) + "/layout-" + bpf.Layout() + "/" + name); err != nil {
			t.Fatal(err)
		}
	}
	// Nobody admits it: the guard drops its SYN.
	if _, err := tryDial(t, f.web.Namespace, to, 300*time.Millisecond); !isTimeout(err) {
		t.Errorf("without the hook that admits connections: %v, want a timeout", err)
	}
	if mended, err := f.dp.Repair(); len(mended) != 1 || err != nil {
		t.Fatalf("mended %q, %v", mended, err)
	}
	client, server := f.pair(t, l, to)
	send(t, client, server, "again")
}
