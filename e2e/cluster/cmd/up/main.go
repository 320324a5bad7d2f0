// Command up starts a cluster to look at, with the tests' own application (cluster.AppRef) for pods
// to run, says how to use it, and ends it with Ctrl-C:
//
//	go run ./e2e/cluster/cmd/up [-ipv6 | -dual] [-nodes 2] [IMAGE.tar ...]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

func main() {
	var config cluster.Config
	flag.IntVar(&config.Nodes, "nodes", 2, "how many nodes")
	flag.StringVar(&config.CNI, "cni", "bridge", "bridge or none")
	flag.StringVar(&config.ProxyMode, "proxy", "nftables", "nftables, iptables or none")
	six := flag.Bool("ipv6", false, "IPv6")
	dual := flag.Bool("dual", false, "both families")
	flag.Parse()
	switch {
	case *dual:
		config.IPFamilies = cluster.DualStack
	case *six:
		config.IPFamilies = cluster.IPv6
	}
	config.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(config, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(config cluster.Config, images []string) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := cluster.Start(ctx, config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := c.LoadApp(ctx); err != nil {
		return err
	}
	for _, tar := range images {
		if err := c.LoadImage(ctx, tar); err != nil {
			return err
		}
	}
	fmt.Println(c.KubectlCommand(ctx, nil).String(), "# in:", "nsenter --net="+c.Administrator().Path())
	for _, n := range c.Nodes() {
		fmt.Println(n.Command(ctx, "bash").String(), "#", n.Name)
	}
	<-ctx.Done()
	return nil
}
