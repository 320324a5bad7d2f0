// Command parts builds and downloads what the tests' Kubernetes clusters are made of, unless
// that is in the cache already, and prints where it is.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"

	"github.com/raceway-mesh/raceway/e2e/cluster/parts"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	p, err := parts.Build(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err == nil {
		fmt.Println(p.Dir)
	}
	return err
}
