package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/raceway-mesh/raceway/cmd/raceway/internal/demo"
)

// demoError is a demo that did not come to its good end.
type demoError struct{ error }

func (e demoError) Unwrap() error { return e.error }

// Is gives it the exit code of bad news.
func (e demoError) Is(target error) bool { return target == errFound }

func newDemo(c *cli) *cobra.Command {
	var cfg demo.Config
	remove := false
	cmd := &cobra.Command{
		Use:   "demo",
		Short: demoShort,
		Long:  demoLong,
		Example: `  raceway demo
  raceway demo --ipv6
  raceway demo --keep
  raceway demo --remove`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx, stop := endable(cmd.Context())
			defer stop()
			switch {
			case remove && cfg != (demo.Config{}):
				return usagef("--remove goes with no other flag: remove first, and then run %q again", "raceway demo")
			case remove:
				err = demo.Remove(c.out)
			default:
				err = c.demo(ctx, cfg)
			}
			if err != nil {
				return demoError{err}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&cfg.IPv6, "ipv6", false, "give pods and services IPv6 addresses instead of IPv4")
	f.BoolVar(&cfg.Keep, "keep", false, "leave everything running at the end, and say what to try")
	f.BoolVar(&cfg.MariaDB, "mariadb", false, "insist on a real MariaDB, which is used only where it is installed otherwise")
	f.BoolVar(&remove, "remove", false, "remove what --keep or a killed demo left, and do nothing else")
	cmd.AddCommand(newDemoServer(), newDemoClient())
	return cmd
}

// endable ends the context also when the terminal or the reader of a pipe goes away: the
// demo has things to remove.
func endable(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGQUIT)
}

func (c *cli) demo(ctx context.Context, cfg demo.Config) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	cfg.Program, cfg.Out, cfg.Color = program, c.out, c.color
	if file, ok := c.out.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		if width, _, err := term.GetSize(int(file.Fd())); err == nil {
			cfg.Width = width
		}
	}
	return demo.Run(ctx, cfg)
}

// The applications in the demo's pods.

func newDemoServer() *cobra.Command {
	var s demo.Server
	cmd := &cobra.Command{
		Use: "server", Hidden: true, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.Run(cmd.Context()) },
	}
	cmd.Flags().StringVar(&s.Socket, "socket", "", "where it answers questions")
	return cmd
}

func newDemoClient() *cobra.Command {
	var c demo.Client
	var target string
	cmd := &cobra.Command{
		Use: "client", Hidden: true, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if c.Target, err = netip.ParseAddrPort(target); err != nil {
				return usagef("--target: %w", err)
			}
			return c.Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&c.Socket, "socket", "", "where it answers questions")
	cmd.Flags().StringVar(&target, "target", "", "address and port of the server")
	return cmd
}
