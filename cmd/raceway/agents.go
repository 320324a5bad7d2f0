package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

const (
	defaultSocketDir = "/run/raceway"
	socketSuffix     = ".sock"
	cniSocket        = "cni.sock" // the CNI plugin's, in the same directory
	agentEnv         = "RACEWAY_AGENT"
	allAgents        = "all"
)

// agent is one to be asked.
type agent struct {
	name string // the node's, or the path that was given
	*admin.Client
}

// fleet is where agents are found: this machine, or a cluster.
type fleet interface {
	// agents lists all of them, at least one.
	agents(ctx context.Context) ([]agent, error)
	// where is the place, in words.
	where() string
}

// agents are those that --agent names; without it all of a cluster, or the only one of this
// machine.
func (c *cli) agents(ctx context.Context) ([]agent, error) {
	if len(c.flags.agents) > 0 {
		return c.namedAgents(ctx)
	}
	f, err := c.fleet()
	if err != nil {
		return nil, err
	}
	all, err := f.agents(ctx)
	if _, local := f.(sockets); local && len(all) > 1 {
		return nil, usagef("there are several agents here (%s): choose with --agent %s, or --agent %s", names(all), all[0].name, allAgents)
	}
	return all, err
}

// anyAgents are all agents unless --agent chooses, for verbs where none is the wrong one.
func (c *cli) anyAgents(ctx context.Context) ([]agent, error) {
	if len(c.flags.agents) > 0 {
		return c.namedAgents(ctx)
	}
	f, err := c.fleet()
	if err != nil {
		return nil, err
	}
	return f.agents(ctx)
}

func (c *cli) namedAgents(ctx context.Context) ([]agent, error) {
	var chosen []agent
	add := func(a agent) {
		if !slices.ContainsFunc(chosen, func(other agent) bool { return other.Address() == a.Address() }) {
			chosen = append(chosen, a)
		}
	}
	for _, name := range c.flags.agents {
		switch {
		case name == "":
			return nil, usagef("--agent is empty: name a node, a socket's path, or %s", allAgents)
		case strings.ContainsRune(name, filepath.Separator):
			add(agent{strings.TrimSuffix(filepath.Base(name), socketSuffix), admin.NewClient(name)})
		default:
			found, err := c.find(ctx, name)
			if err != nil {
				return nil, err
			}
			for _, a := range found {
				add(a)
			}
		}
	}
	return chosen, nil
}

// find tells a mistyped node from an agent that does not answer.
func (c *cli) find(ctx context.Context, name string) ([]agent, error) {
	f, err := c.fleet()
	if err != nil {
		return nil, err
	}
	all, err := f.agents(ctx)
	if err != nil || name == allAgents {
		return all, err
	}
	at := slices.IndexFunc(all, func(a agent) bool { return a.name == name })
	if at < 0 {
		return nil, usagef("there is no agent of node %q in %s, only of %s", name, f.where(), names(all))
	}
	return all[at : at+1], nil
}

func names(agents []agent) string {
	list := make([]string, len(agents))
	for i, a := range agents {
		list[i] = a.name
	}
	return strings.Join(list, ", ")
}

// fleet is the cluster that flags name, else this machine when an agent has a socket here,
// else the cluster of the kubeconfig.
func (c *cli) fleet() (fleet, error) {
	here := sockets{dir: c.socketDir}
	chosen := c.flags.cluster.Kubeconfig != "" || c.flags.cluster.Context != ""
	if !chosen && (here.any() || !c.kubeConfigured()) {
		return here, nil
	}
	cluster, err := c.cluster()
	if err != nil {
		return nil, err
	}
	return pods{cluster}, nil
}

// cluster is the one that the flags or the kubeconfig name.
func (c *cli) cluster() (*kube.Cluster, error) { return kube.Open(c.flags.cluster) }

// sockets are the agents of this machine.
type sockets struct{ dir string }

func (s sockets) where() string { return s.dir }

func (s sockets) any() bool {
	all, err := s.agents(context.Background()) // it asks nobody
	return len(all) > 0 || errors.Is(err, fs.ErrPermission)
}

func (s sockets) agents(context.Context) ([]agent, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("read %s: %w: run this as root", s.dir, fs.ErrPermission)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for agents: %w", err)
	}
	var agents []agent // ReadDir sorts
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), socketSuffix); ok && e.Type() == fs.ModeSocket && e.Name() != cniSocket {
			agents = append(agents, agent{name, admin.NewClient(filepath.Join(s.dir, e.Name()))})
		}
	}
	if len(agents) == 0 {
		return nil, fmt.Errorf("no agent socket in %s: is raceway-agent running on this node?", s.dir)
	}
	return agents, nil
}

// pods are the agents of a cluster.
type pods struct{ *kube.Cluster }

func (p pods) where() string { return "namespace " + p.Namespace }

func (p pods) agents(ctx context.Context) ([]agent, error) {
	found, err := p.Agents(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.MayAsk(ctx); err != nil {
		return nil, err
	}
	agents := make([]agent, 0, len(found))
	for _, a := range found {
		agents = append(agents, agent{a.Node, admin.NewDialingClient(a.Node, func(ctx context.Context) (net.Conn, error) {
			return p.Dial(ctx, a)
		})})
	}
	return agents, nil
}

// answer is what one agent said.
type answer[T any] struct {
	agent string
	value T
	err   error
}

// ask puts one question to all agents at once; the answers come in their order.
func ask[T any](ctx context.Context, agents []agent, question func(context.Context, agent) (T, error)) []answer[T] {
	answers := make([]answer[T], len(agents))
	var wg sync.WaitGroup
	for i, a := range agents {
		wg.Go(func() {
			defer a.Close()
			value, err := question(ctx, a)
			if err != nil && len(agents) > 1 {
				err = fmt.Errorf("agent %s: %w", a.name, err)
			}
			answers[i] = answer[T]{a.name, value, err}
		})
	}
	wg.Wait()
	return answers
}

// tagged is a row and the agent that gave it.
type tagged[T any] struct {
	agent string
	row   T
}

// rows puts the agents' lists together; what some could not answer is the error beside
// what the others did.
func rows[T any](answers []answer[[]T]) ([]tagged[T], error) {
	var all []tagged[T]
	var errs []error
	for _, a := range answers {
		errs = append(errs, a.err)
		for _, row := range a.value {
			all = append(all, tagged[T]{a.agent, row})
		}
	}
	return all, errors.Join(errs...)
}

// sortRows orders by compare, and by agent where that finds no difference.
func sortRows[T any](all []tagged[T], compare func(a, b T) int) {
	slices.SortStableFunc(all, func(a, b tagged[T]) int {
		return cmp.Or(compare(a.row, b.row), cmp.Compare(a.agent, b.agent))
	})
}
