package traffic

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// maxStream is the most that one stream of mixed load carries in each direction.
const maxStream = 4 << 20

// MixedResult is what a mixed load came to.
type MixedResult struct {
	Streams  uint64 // whole streams that came back with the right checksum
	Slow     uint64 // of them, those whose reader was slow
	Requests uint64 // connections with some requests
	Resets   uint64 // connections that the client reset in the middle
	Bytes    uint64 // that came back
}

// mix counts while the load runs.
type mix struct{ streams, slow, requests, resets, bytes atomic.Uint64 }

// Mixed has that many clients do one thing after the other, by chance: stream random bytes
// and compare the checksum of what comes back, read it slowly, exchange requests, or reset
// the connection in the middle. Each half closes its streams and expects the other's end.
func Mixed(ctx context.Context, to netip.AddrPort, clients int, d time.Duration) (MixedResult, error) {
	var m mix
	group, ctx := errgroup.WithContext(ctx)
	until := time.Now().Add(d)
	for range clients {
		group.Go(func() error {
			for time.Now().Before(until) && ctx.Err() == nil {
				if err := m.step(ctx, to); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return MixedResult{}, fmt.Errorf("mixed load: %w", err)
	}
	return MixedResult{m.streams.Load(), m.slow.Load(), m.requests.Load(), m.resets.Load(), m.bytes.Load()}, nil
}

func (m *mix) step(ctx context.Context, to netip.AddrPort) error {
	switch rand.IntN(8) {
	case 0:
		m.resets.Add(1)
		return resetMidway(ctx, to)
	case 1:
		m.requests.Add(1)
		return someRequests(ctx, to)
	case 2:
		m.slow.Add(1)
		return m.stream(ctx, to, 5*time.Millisecond)
	}
	return m.stream(ctx, to, 0)
}

// stream sends up to maxStream and compares checksums; pause is between two reads.
func (m *mix) stream(ctx context.Context, to netip.AddrPort, pause time.Duration) error {
	conn, err := dial(ctx, to, streamMode)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // all has come back, or something is reported already
	if err := conn.SetDeadline(time.Now().Add(2 * answerTimeout)); err != nil {
		return err
	}
	size := rand.IntN(maxStream)
	sent := make(chan error, 1)
	sum := sha256.New()
	go func() { sent <- sendStream(conn, size, sum) }()
	got := sha256.New()
	n, err := io.CopyBuffer(got, slowReader{conn, pause}, make([]byte, chunkSize))
	if sendErr := <-sent; err == nil {
		err = sendErr
	}
	if err != nil {
		return fmt.Errorf("stream of %d bytes, %d came back: %w", size, n, err)
	}
	if n != int64(size) || string(got.Sum(nil)) != string(sum.Sum(nil)) {
		return fmt.Errorf("stream of %d bytes: %d others came back", size, n)
	}
	m.streams.Add(1)
	m.bytes.Add(uint64(n))
	return nil
}

func sendStream(conn *net.TCPConn, size int, sum io.Writer) error {
	chunk := randomBytes(min(size, 64<<10))
	for left := size; left > 0; {
		part := chunk[:1+rand.IntN(min(left, len(chunk)))]
		_, _ = sum.Write(part) // a hash never fails
		if _, err := conn.Write(part); err != nil {
			return err
		}
		left -= len(part)
	}
	return conn.CloseWrite()
}

// slowReader pauses before each read. It hides what would move bytes in another way.
type slowReader struct {
	r     io.Reader
	pause time.Duration
}

func (s slowReader) Read(p []byte) (int, error) {
	if s.pause > 0 {
		time.Sleep(s.pause)
	}
	return s.r.Read(p)
}

func someRequests(ctx context.Context, to netip.AddrPort) error {
	conn, err := dial(ctx, to, binary.BigEndian.AppendUint32([]byte{echoMode}, MessageSize)...)
	if err != nil {
		return err
	}
	for range 1 + rand.IntN(20) {
		if err := exchangeOnce(conn); err != nil {
			return errors.Join(err, conn.Close())
		}
	}
	return conn.Close()
}

// resetMidway leaves the server, and all between, with bytes that nobody wants.
func resetMidway(ctx context.Context, to netip.AddrPort) error {
	conn, err := dial(ctx, to, streamMode)
	if err != nil {
		return err
	}
	if err := conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return errors.Join(err, conn.Close())
	}
	// Nobody reads the answer, so this may well stop in the middle.
	if _, err := conn.Write(randomBytes(1 + rand.IntN(maxStream/8))); err != nil && !isTimeout(err) {
		return errors.Join(err, conn.Close())
	}
	return errors.Join(conn.SetLinger(0), conn.Close())
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}
