package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
)

// DirectEvent is what became of a connection that goes by the kernel.
type DirectEvent int

// Kinds of DirectEvent.
const (
	// DirectOpened: both ends have it; or, if it has not Arrived, somebody between them, and it is
	// to be cut.
	DirectOpened DirectEvent = iota + 1
	// DirectClosed: the client's socket is gone.
	DirectClosed
	// DirectFailed: it was refused, or nobody answered.
	DirectFailed
	// DirectUnanswered: its SYN did not arrive in the destination; the agent carries it now.
	DirectUnanswered
	// DirectLive: it is listed.
	DirectLive
)

// DirectID tells one connection from all others; it is comparable.
type DirectID struct {
	key    bpf.RacewayTuple
	client uint64 // cookie of its namespace
	since  uint64
}

// DirectConnection is one that goes by the kernel, as its client's socket knows it.
type DirectConnection struct {
	ID    DirectID
	Event DirectEvent
	// Client and Server are the pods' UIDs, "" for one that is not in force any more.
	Client, Server string
	// From and To are its ends, Asked what the application connected to.
	From, To, Asked netip.AddrPort
	// Started and Now are times of CLOCK_MONOTONIC.
	Started, Now time.Duration
	// Sent and Received are bytes of payload that were acknowledged by the server, and came
	// back.
	Sent, Received uint64
	RTT            time.Duration
	Retransmits    uint32
	// Arrived says that the SYN was seen in the server's namespace.
	Arrived bool
	// Clean says that both ends finished.
	Clean bool
	// Err is the client's socket's, nil for none.
	Err error
}

// directPace is how long events may wait for others, so that many cost one wake-up.
const directPace = 10 * time.Millisecond

// FollowDirect hands each event to fn until ctx ends. One at a time may follow.
func (d *Datapath) FollowDirect(ctx context.Context, fn func(DirectConnection)) error {
	if err := d.Direct(); err != nil {
		return err
	}
	reader, err := ringbuf.NewReader(d.loaded.maps.Events)
	if err != nil {
		return fmt.Errorf("read events of connections by the kernel: %w", err)
	}
	defer func() { _ = reader.Close() }() // perhaps again
	defer context.AfterFunc(ctx, func() { _ = reader.Close() })()
	pause := time.NewTimer(0)
	defer pause.Stop()
	var record ringbuf.Record
	for {
		err := reader.ReadInto(&record)
		switch {
		case errors.Is(err, ringbuf.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("read events of connections by the kernel: %w", err)
		}
		var e bpf.RacewayEvent
		if err := binary.Read(bytes.NewReader(record.RawSample), binary.NativeEndian, &e); err != nil {
			return fmt.Errorf("read an event of a connection by the kernel: %w", err)
		}
		fn(d.describe(e))
		if record.Remaining > 0 {
			continue
		}
		pause.Reset(directPace)
		select {
		case <-pause.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// DirectConnections lists those that live.
func (d *Datapath) DirectConnections() ([]DirectConnection, error) {
	if err := d.Direct(); err != nil {
		return nil, err
	}
	events, err := d.listDirect()
	if err != nil {
		return nil, err
	}
	var live []DirectConnection
	for _, e := range events {
		if e.Kind == bpf.RacewayEventKindEVENT_LIVE {
			live = append(live, d.describe(e))
		}
	}
	return live, nil
}

func (d *Datapath) listDirect() ([]bpf.RacewayEvent, error) {
	list, err := d.loaded.listDirect.Open()
	if err != nil {
		return nil, fmt.Errorf("list connections by the kernel: %w", err)
	}
	data, err := io.ReadAll(list)
	if err := errors.Join(err, list.Close()); err != nil {
		return nil, fmt.Errorf("list connections by the kernel: %w", err)
	}
	return records[bpf.RacewayEvent]("iter/bpf_sk_storage_map", data)
}

func (d *Datapath) describe(e bpf.RacewayEvent) DirectConnection {
	d.mu.Lock()
	uids := d.uidsLocked()
	d.mu.Unlock()
	at := func(a bpf.RacewayAddr, port uint16) netip.AddrPort { return netip.AddrPortFrom(fromAddr(a), port) }
	key, asked := e.What.Key, e.What.Asked
	c := DirectConnection{
		ID:    DirectID{key: key, client: asked.Netns, since: e.What.Since},
		Event: directEvent(e.Kind),
		// Those of pods that were released are not found.
		Client: uids[asked.Netns], Server: uids[key.Netns],
		From: at(key.Remote, key.RemotePort), To: at(key.Local, key.LocalPort), Asked: at(asked.Addr, asked.Port),
		Started: time.Duration(e.What.Since), Now: time.Duration(e.Now),
		Sent: e.Sent, Received: e.Received,
		RTT: time.Duration(e.Srtt) * time.Microsecond, Retransmits: e.Retransmits,
		Arrived: e.Arrived != 0, Clean: e.Clean != 0,
	}
	if e.Error != 0 {
		c.Err = unix.Errno(e.Error)
	}
	return c
}

func directEvent(kind bpf.RacewayEventKind) DirectEvent {
	switch kind {
	case bpf.RacewayEventKindEVENT_OPENED:
		return DirectOpened
	case bpf.RacewayEventKindEVENT_CLOSED:
		return DirectClosed
	case bpf.RacewayEventKindEVENT_FAILED:
		return DirectFailed
	case bpf.RacewayEventKindEVENT_UNANSWERED:
		return DirectUnanswered
	case bpf.RacewayEventKindEVENT_OPENING, bpf.RacewayEventKindEVENT_LIVE:
	}
	return DirectLive
}

// lateAfter is LATE_NS of bpf/include/direct.h.
const lateAfter = time.Minute

// age is how long ago a time of the programs was.
func age(since uint64) time.Duration { return monotonic() - time.Duration(since) }

// Monotonic is the present by the clock of DirectConnection.
func Monotonic() time.Duration { return monotonic() }

// Cut ends a connection: from then on no data of it passes the guards, and the client sees a
// reset, the server that it was aborted. It may have ended already.
func (d *Datapath) Cut(id DirectID) error {
	d.mu.Lock()
	freed := d.freed
	d.mu.Unlock()
	if freed {
		return os.ErrClosed
	}
	key := id.key
	if err := ignoreMissing(d.loaded.maps.Admitted.Delete(key)); err != nil {
		return fmt.Errorf("cut a connection by the kernel: %w", err)
	}
	local := netip.AddrPortFrom(fromAddr(key.Local), key.LocalPort)
	remote := netip.AddrPortFrom(fromAddr(key.Remote), key.RemotePort)
	var errs []error
	for _, end := range []struct {
		cookie        uint64
		local, remote netip.AddrPort
	}{{key.Netns, local, remote}, {id.client, remote, local}} {
		// The other end hears of it where one pod is not open any more.
		if p := d.openPod(end.cookie); p != nil {
			errs = append(errs, p.ns.Do(func() error { return destroy(end.local, end.remote) }))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cut a connection by the kernel from %s to %s: %w", remote, local, err)
	}
	return nil
}
