package traffic

import (
	"context"
	"crypto/rand"
	"encoding/binary"
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
	conns, err := dialAll(ctx, to, bulkMode, streams)
	if err != nil {
		return BulkResult{}, fmt.Errorf("bulk transfer: %w", err)
	}
	var group errgroup.Group
	received := make([]uint64, streams)
	start := time.Now()
	for i, conn := range conns {
		group.Go(func() (err error) {
			received[i], err = send(conn, start.Add(d))
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
	chunk := make([]byte, chunkSize)
	_, _ = rand.Read(chunk) // never fails, see crypto/rand
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
