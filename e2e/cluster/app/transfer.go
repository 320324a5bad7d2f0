package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"time"
)

const mebibyte = 1 << 20

// transfer sends noise to an echo, and wants what comes back to have the same hash. Each
// direction is closed when it has carried everything.
func (c client) transfer(ctx context.Context, address string, mebibytes int) (err error) {
	conn, err := c.dial(ctx, address)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return err
	}
	sent, received := sha256.New(), sha256.New()
	sending := make(chan error, 1)
	go func() {
		noise := io.LimitReader(rand.NewChaCha8([32]byte{}), int64(mebibytes)*mebibyte)
		_, err := io.Copy(io.MultiWriter(conn, sent), noise)
		sending <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	n, err := io.Copy(received, conn)
	if err := errors.Join(<-sending, err); err != nil {
		return err
	}
	if n != int64(mebibytes)*mebibyte || !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
		return fmt.Errorf("%d bytes came back, and not those of %d MiB that were sent", n, mebibytes)
	}
	_, err = fmt.Printf("%x\n", received.Sum(nil))
	return err
}

// hear says nothing itself.
func (c client) hear(ctx context.Context, address string) error {
	conn, err := c.dial(ctx, address)
	if err != nil {
		return err
	}
	err = conn.SetDeadline(time.Now().Add(c.timeout))
	if err == nil {
		_, err = io.Copy(os.Stdout, conn)
	}
	return errors.Join(err, conn.Close())
}
