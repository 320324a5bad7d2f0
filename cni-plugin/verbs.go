package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

const (
	// addTimeout is for one ADD in all; the kubelet gives up on a sandbox after minutes.
	addTimeout = 30 * time.Second
	// patience is for the agent to answer. Capture takes milliseconds, and asking the API
	// server for a pod that the agent has not seen a second or two. One that hangs is as
	// good as away: it may hold up the pods of the mesh, and no others.
	patience = 20 * time.Second
	// comeback is how long an enrolled pod waits for an agent that is away. A container
	// that is started again is there within it, and the kubelet's next attempt, which
	// makes the whole sandbox anew, is not needed. Others do not wait at all.
	comeback = 5 * time.Second
	// knock is how often to look for it.
	knock = 100 * time.Millisecond
	// byTheWay is for what the agent finds out itself in time, and for CHECK.
	byTheWay = 5 * time.Second
)

// Every error of the plugin goes through the runtime into an event of the pod, and nothing
// else of it is seen by anyone: stderr is not kept.
func tryAgain(s discovery.Sandbox, format string, args ...any) error {
	return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("pod %s: ", s.Pod)+fmt.Sprintf(format, args...), "")
}

func add(args *skel.CmdArgs) error {
	a, err := readAttachment(args)
	if err != nil {
		return err
	}
	if a.prev == nil {
		return noResult("ADD")
	}
	if a.concerned() {
		ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
		defer cancel()
		if err := a.capture(ctx); err != nil {
			return err
		}
	}
	return types.PrintResult(a.prev, a.version)
}

func noResult(verb string) error {
	return types.NewError(types.ErrInvalidNetworkConfig, verb+" of raceway-cni without a result of a plugin before: it is to be the last of a list", "")
}

// concerned is false for what never waits: what is no pod, and the agent's own namespace,
// whose pods bring the agent back.
func (a *attachment) concerned() bool {
	return a.isPod && a.sandbox.Pod.Namespace != a.entry.Namespace
}

// capture returns when the pod is captured, or is not to be.
func (a *attachment) capture(ctx context.Context) error {
	agent := node.NewClient(a.entry.Socket)
	started := time.Now()
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := agent.Add(asking, a.sandbox)
	if !away(err) {
		return a.refused(err)
	}
	verdict := a.decide(ctx, err)
	if !verdict.wanted {
		return nil
	}
	for time.Since(started) < comeback && away(err) {
		time.Sleep(knock)
		_, err = agent.Add(asking, a.sandbox)
	}
	if !away(err) {
		return a.refused(err)
	}
	return a.heldUp(err, verdict)
}

// away reports whether the agent cannot be asked for now, rather than that it said no.
func away(err error) bool {
	return errors.Is(err, node.ErrAway) || errors.Is(err, node.ErrNotReady) || errors.Is(err, context.DeadlineExceeded)
}

func (a *attachment) refused(err error) error {
	if err == nil {
		return nil
	}
	return tryAgain(a.sandbox, "the agent has not captured it: %v", err)
}

func (a *attachment) heldUp(err error, v verdict) error {
	return tryAgain(a.sandbox, "%v; the pod is held up because %s, and is tried again; look for this node's agent: kubectl -n %s get pods -o wide",
		err, v.reason, a.entry.Namespace)
}

func check(args *skel.CmdArgs) error {
	a, err := readAttachment(args)
	if err != nil {
		return err
	}
	if a.prev == nil {
		return noResult("CHECK")
	}
	if !a.concerned() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	asking, cancel := context.WithTimeout(ctx, byTheWay)
	defer cancel()
	err = node.NewClient(a.entry.Socket).Check(asking, a.sandbox)
	switch {
	case err == nil:
		return nil
	case !away(err):
		return types.NewError(types.ErrInternal, fmt.Sprintf("pod %s is not as it should be: %v", a.sandbox.Pod, err), "")
	}
	if v := a.decide(ctx, err); v.wanted {
		return tryAgain(a.sandbox, "%v, so it cannot say whether the pod is captured, as it should be because %s", err, v.reason)
	}
	return nil
}

// del tells the agent and succeeds in any case, as the specification asks: the agent notices
// by itself that a pod is gone, and a DEL that fails keeps the pod from going.
func del(args *skel.CmdArgs) error {
	a, err := readAttachment(args)
	if err != nil || !a.concerned() {
		return nil //nolint:nilerr // see above
	}
	ctx, cancel := context.WithTimeout(context.Background(), byTheWay)
	defer cancel()
	_ = node.NewClient(a.entry.Socket).Del(ctx, a.sandbox)
	return nil
}
