// Command labclean removes the labs of this machine whose maker was killed or kept them.
// Labs of processes that still run are left alone.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

func main() {
	if err := clean(); err != nil {
		fmt.Fprintln(os.Stderr, "labclean:", err)
		os.Exit(1)
	}
}

func clean() error {
	known, err := lab.Known()
	if err != nil {
		return err
	}
	var errs []error
	for name, running := range known {
		if running {
			continue
		}
		found, err := lab.Remove(name)
		fmt.Printf("removed lab %s: %d things\n", name, len(found))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
