// Command app is what tests run in pods: a server, and clients of it.
//
//	app serve                   HTTP, an echo (of datagrams, too), a greeting and gRPC's health service, until it is told to end
//	app webhook DIR             admission webhook with tls.crt and tls.key of DIR; refuses what is named refused
//	app get [-n N] URL          N requests, each on a connection of its own; the last answer
//	app echo ADDRESS TEXT       one connection, one message and its echo
//	app ask ADDRESS TEXT        one datagram to the echo, again each second, and its echo
//	app resolve NAME            the addresses of a name
//	app transfer [-n N] ADDRESS N MiB to the echo and back, and what they hash to
//	app hear ADDRESS            what a server says that speaks first
//	app loop URL                requests one after the other, each on a new connection
//	app hold ADDRESS            one connection, used again and again
//	app check                   whether the server in this container is well, for exec probes
//
// loop and hold print what they have counted as a line of JSON (Count) each second.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Ports of serve.
const (
	httpPort  = 8080
	echoPort  = 9000
	grpcPort  = 9090
	greetPort = 9100
	hookPort  = 8443
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("usage: app serve | webhook | get | echo | ask | resolve | transfer | hear | loop | hold | check")
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	count := flags.Int("n", 1, "how many")
	every := flags.Duration("every", 20*time.Millisecond, "pause between uses")
	timeout := flags.Duration("timeout", 5*time.Second, "for one request")
	from := flags.Int("from", 0, "port that connections of echo and hold come from, whether it was used before or not; 0 for any")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	c := client{timeout: *timeout, from: *from}
	switch args[0] {
	case "serve":
		return serve(ctx)
	case "webhook":
		return serveWebhook(ctx, flags.Arg(0))
	case "get":
		return c.get(ctx, flags.Arg(0), *count)
	case "echo":
		return c.echo(ctx, flags.Arg(0), flags.Arg(1))
	case "ask":
		return c.ask(ctx, flags.Arg(0), flags.Arg(1))
	case "resolve":
		return c.resolve(ctx, flags.Arg(0))
	case "transfer":
		return c.transfer(ctx, flags.Arg(0), *count)
	case "hear":
		return c.hear(ctx, flags.Arg(0))
	case "loop":
		return c.loop(ctx, flags.Arg(0), *every)
	case "hold":
		return c.hold(ctx, flags.Arg(0), *every)
	case "check":
		return c.get(ctx, fmt.Sprintf("http://localhost:%d/", httpPort), 1)
	}
	return fmt.Errorf("unknown command %q", args[0])
}
