package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
)

// newAdminPipe is the other end of a question to a cluster: it runs inside the agent's pod.
func newAdminPipe(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:    kube.PipeVerb,
		Short:  "Join standard input and output to the agent's admin socket",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			agents, err := sockets{c.socketDir}.agents(cmd.Context())
			if err != nil {
				return err
			}
			if len(agents) > 1 {
				return usagef("there are several agents here: %s", names(agents))
			}
			return pipe(cmd.Context(), agents[0].Address(), os.Stdin, c.out)
		},
	}
}

// pipe copies both ways until one side ends.
func pipe(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("connect to the agent: %w", err)
	}
	ended := make(chan error, 2)
	join := func(to io.Writer, from io.Reader) {
		_, err := io.Copy(to, from)
		ended <- err
	}
	go join(conn, in)
	go join(out, conn)
	select {
	case err = <-ended:
	case <-ctx.Done():
	}
	return errors.Join(err, conn.Close())
}
