package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	mathrand "math/rand/v2"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Bytes of one transfer in each direction. The race detector makes the agents' copying
// several times as slow, and not otherwise different.
const (
	transferBytes     = 1 << 30
	transferBytesRace = 128 << 20
)

// transferMemory is what an agent may grow by while 50 connections move what they can in
// both directions: the windows of their streams, not what they carry.
const transferMemory = 768 << 20

// transferTime is when a transfer is given up.
const transferTime = 5 * time.Minute

// Random data in chunks of random sizes goes both ways at once. Each side ends its direction
// when it has sent all, while the other may still be sending; what was sent is what arrives.
func TestTransfersAreExact(t *testing.T) {
	total := transferBytes
	if raceEnabled {
		total = transferBytesRace
	}
	s := newShop(t, lab.Options{})
	for _, connections := range []int{1, 50} {
		t.Run(strconv.Itoa(connections), func(t *testing.T) {
			transfer(t, s, connections, total/connections)
		})
	}
}

// transfer moves size bytes each way on each connection.
func transfer(t *testing.T, s *shop, connections, size int) {
	served := make(chan error, connections)
	serve(t, s.db, portReturn, func(conn *net.TCPConn) { served <- exchange(conn, size) })
	before := s.memory()
	var clients sync.WaitGroup
	for range connections {
		conn := dialFrom(t, s.web, s.db.AddrPort(portReturn))
		clients.Go(func() {
			if err := exchange(conn, size); err != nil {
				t.Error("the client's side:", err)
			}
		})
	}
	clients.Wait()
	for range connections {
		if err := <-served; err != nil {
			t.Error("the server's side:", err)
		}
	}
	for i, after := range s.memory() {
		t.Logf("agent of node%d: %d MiB before, %d MiB after %d MiB each way on %d connections",
			i+1, before[i]>>20, after>>20, connections*size>>20, connections)
		if after > before[i]+transferMemory {
			t.Errorf("agent of node%d grew by %d MiB", i+1, (after-before[i])>>20)
		}
	}
}

// exchange sends size random bytes and then their hash, ends its direction, and checks that
// the other side does so too.
func exchange(conn *net.TCPConn, size int) error {
	if err := conn.SetDeadline(time.Now().Add(transferTime)); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { sent <- send(conn, size) }()
	return errors.Join(receive(conn, size), <-sent)
}

func send(conn *net.TCPConn, size int) error {
	var seed [32]byte
	copy(seed[:], random(len(seed)))
	content, chunks := mathrand.NewChaCha8(seed), mathrand.New(mathrand.NewPCG(uint64(seed[0]), uint64(seed[1])))
	sum := sha256.New()
	buffer := make([]byte, 256<<10)
	for left := size; left > 0; {
		chunk := buffer[:min(left, 1+chunks.IntN(1+chunks.IntN(len(buffer))))] // small ones more often
		_, _ = content.Read(chunk)                                             // never fails
		sum.Write(chunk)
		if _, err := conn.Write(chunk); err != nil {
			return fmt.Errorf("send, %d bytes before the end: %w", left, err)
		}
		left -= len(chunk)
	}
	if _, err := conn.Write(sum.Sum(nil)); err != nil {
		return fmt.Errorf("send the hash: %w", err)
	}
	return conn.CloseWrite()
}

func receive(conn *net.TCPConn, size int) error {
	sum := sha256.New()
	if _, err := io.CopyN(sum, struct{ io.Reader }{conn}, int64(size)); err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	return checkSum(conn, sum)
}

// checkSum wants the hash, and nothing after it but the end.
func checkSum(conn io.Reader, sum hash.Hash) error {
	told, err := io.ReadAll(conn)
	switch {
	case err != nil:
		return fmt.Errorf("receive the hash: %w", err)
	case string(told) != string(sum.Sum(nil)):
		return errors.New("what was received is not what was sent")
	}
	return nil
}
