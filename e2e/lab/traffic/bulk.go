package traffic

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
)

// BulkResult is what a bulk transfer came to.
type BulkResult struct {
	Bytes   uint64        // received, all streams together
	Elapsed time.Duration // from the first write until the last byte was confirmed
}

// Bulk sends on that many connections for a duration. The time until the receiver has
// confirmed the last byte counts, so that no buffer on the way makes it look faster.
func Bulk(ctx context.Context, to netip.AddrPort, streams int, d time.Duration) (BulkResult, error) {
	return transfer(ctx, to, streams, d, direction{bulkMode, send})
}

// Download is Bulk in the other direction: the server sends.
func Download(ctx context.Context, to netip.AddrPort, streams int, d time.Duration) (BulkResult, error) {
	return transfer(ctx, to, streams, d, direction{downloadMode, receive})
}

// direction is what tells the server who sends, and one connection's part until a deadline,
// which returns how much arrived.
type direction struct {
	mode byte
	move func(conn *net.TCPConn, until time.Time) (uint64, error)
}

func transfer(ctx context.Context, to netip.AddrPort, streams int, d time.Duration, dir direction) (BulkResult, error) {
	conns, err := dialAll(ctx, to, streams, dir.mode)
	if err != nil {
		return BulkResult{}, fmt.Errorf("bulk transfer: %w", err)
	}
	var group errgroup.Group
	received := make([]uint64, streams)
	start := time.Now()
	for i, conn := range conns {
		group.Go(func() (err error) {
			received[i], err = dir.move(conn, start.Add(d))
			return err
		})
	}
	err = group.Wait()
	elapsed := time.Since(start)
	if err == nil {
		err = closeAll(conns)
	} else {
		_ = closeAll(conns) // what broke them is known
	}
	if err != nil {
		return BulkResult{}, fmt.Errorf("bulk transfer: %w", err)
	}
	result := BulkResult{Elapsed: elapsed}
	for _, n := range received {
		result.Bytes += n
	}
	return result, nil
}

// send sends random data until the deadline and returns how much the receiver got.
func send(conn *net.TCPConn, until time.Time) (uint64, error) {
	chunk := randomBytes(chunkSize)
	var sent uint64
	for time.Now().Before(until) {
		n, err := conn.Write(chunk)
		sent += uint64(n)
		if err != nil {
			return 0, err
		}
	}
	if err := conn.CloseWrite(); err != nil {
		return 0, err
	}
	if err := conn.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return 0, err
	}
	confirmed, err := io.ReadAll(io.LimitReader(conn, 9))
	if err != nil {
		return 0, err
	}
	if len(confirmed) != 8 {
		return 0, fmt.Errorf("the receiver confirmed with %d bytes, not 8", len(confirmed))
	}
	got := binary.BigEndian.Uint64(confirmed)
	if got != sent {
		return 0, fmt.Errorf("sent %d bytes, the receiver got %d", sent, got)
	}
	return got, nil
}

// receive has the server send until the deadline and returns how much arrived.
func receive(conn *net.TCPConn, until time.Time) (uint64, error) {
	if _, err := conn.Write([]byte{downloadMode}); err != nil { // any byte will do
		return 0, err
	}
	stop := time.AfterFunc(time.Until(until), func() { _ = conn.CloseWrite() }) // when it is broken, Read tells
	defer stop.Stop()
	if err := conn.SetReadDeadline(until.Add(answerTimeout)); err != nil {
		return 0, err
	}
	var (
		buffer = make([]byte, chunkSize)
		last   []byte // the last eight bytes are no data but their number
		got    uint64
	)
	for {
		n, err := conn.Read(buffer)
		got += uint64(n)
		last = append(last, buffer[max(0, n-8):n]...)
		last = last[max(0, len(last)-8):]
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	if got < 8 {
		return 0, fmt.Errorf("the sender ended after %d bytes", got)
	}
	got -= 8
	if sent := binary.BigEndian.Uint64(last); got != sent {
		return 0, fmt.Errorf("the sender sent %d bytes, %d arrived", sent, got)
	}
	return got, nil
}
