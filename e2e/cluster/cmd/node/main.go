// Command node is the first process of a node that package cluster makes: node STAGE FILE.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/raceway-mesh/raceway/e2e/cluster/node"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: node STAGE FILE; package cluster calls it")
		os.Exit(2)
	}
	if err := node.Boot(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		os.Exit(1)
	}
}
