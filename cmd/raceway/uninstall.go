package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
)

func newUninstall(c *cli) *cobra.Command {
	var u uninstall
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Release every pod of the cluster and take Raceway off it",
		Long: `Tell every agent to release its pods, wait until they are back to plain networking and nothing
is left on their nodes, and delete the installation. Connections that are open go on; no pod
is restarted. The namespace, the CRDs, the policies and the CA's key stay.

A node that is not ready cannot answer. It is named, and does not hold up the rest: when it
comes back its CNI plugin finds Raceway gone and removes itself. An agent that should answer
and does not within --timeout ends the command before anything is deleted, with exit code 1:
its pods would stay closed. --force goes on; ` + "`raceway node release --force`" + ` on that node opens it.

helm uninstall does the same: its hook runs this with --release-only.`,
		Example: `  raceway uninstall
  raceway uninstall --context staging --timeout 10m`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cluster, err := c.cluster()
			if err != nil {
				return err
			}
			return u.run(cmd.Context(), c, cluster)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&u.releaseOnly, "release-only", false, "delete nothing: another tool does, such as helm uninstall")
	f.BoolVar(&u.force, "force", false, "delete the installation although agents did not answer")
	f.DurationVar(&u.timeout, "timeout", 5*time.Minute, "how long to wait for the agents")
	return cmd
}

// uninstall is one run of the verb.
type uninstall struct {
	releaseOnly, force bool
	timeout            time.Duration
}

// installation is what uninstall acts on.
type installation interface {
	Release(ctx context.Context, progress func(done, of int)) (kube.Released, error)
	ForgetCapture(ctx context.Context, nodes []string) error
	Remove(ctx context.Context) (deleted []string, err error)
}

func (u uninstall) run(ctx context.Context, c *cli, cluster installation) error {
	state, err := u.release(ctx, c, cluster)
	if err != nil {
		return err
	}
	silent := slices.Sorted(maps.Keys(state.Silent))
	if len(state.Off) > 0 {
		if err := c.say("not ready, and could not answer: %s; the CNI plugin there lets go when the node is back", strings.Join(state.Off, ", ")); err != nil {
			return err
		}
	}
	var errs []error
	for _, node := range silent {
		errs = append(errs, fmt.Errorf("node %s did not answer: %s", node, state.Silent[node]))
	}
	if len(silent) > 0 && !u.force {
		return errors.Join(append(errs, fmt.Errorf("nothing was deleted: %w", errFound))...)
	}
	if err := cluster.ForgetCapture(ctx, append(slices.Clone(state.Off), silent...)); err != nil {
		errs = append(errs, err)
	}
	if !u.releaseOnly {
		deleted, err := cluster.Remove(ctx)
		errs = append(errs, err)
		for _, name := range deleted {
			errs = append(errs, c.say("deleted %s", name))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w: %w", err, errFound)
	}
	return nil
}

func (u uninstall) release(ctx context.Context, c *cli, cluster installation) (kube.Released, error) {
	ctx, cancel := context.WithTimeout(ctx, u.timeout)
	defer cancel()
	var said error
	state, err := cluster.Release(ctx, func(done, of int) {
		said = errors.Join(said, c.say("%d of %d agents have released their pods", done, of))
	})
	return state, errors.Join(err, said)
}

// say prints a line of progress.
func (c *cli) say(format string, args ...any) error {
	_, err := fmt.Fprintf(c.out, format+"\n", args...)
	return err
}
