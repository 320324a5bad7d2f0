// Package daemon is the main function that Raceway's long-running programs share.
package daemon

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// Main executes cmd until it ends or the process is told to by SIGINT or SIGTERM, and exits
// with 1, and the reason, when it failed.
func Main(cmd *cobra.Command) {
	// Whoever reads the log may end; the Go runtime would end the program at its next line.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := cmd.ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", cmd.Name(), err)
		os.Exit(1)
	}
}
