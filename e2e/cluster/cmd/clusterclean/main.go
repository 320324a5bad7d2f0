// Command clusterclean removes what is left of a cluster whose maker was killed.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/raceway-mesh/raceway/e2e/cluster"
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
	found, err := cluster.Clean(ctx)
	for _, f := range found {
		fmt.Println("removed", f)
	}
	return err
}
