package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

const (
	defaultSocketDir = "/run/raceway"
	socketSuffix     = ".sock"
	agentEnv         = "RACEWAY_AGENT"
	allAgents        = "all"
)

// agent is one to be asked.
type agent struct {
	name string // the node's, or the path that was given
	*admin.Client
}

// agents are those that --agent names; without it the only one of this machine.
func (c *cli) agents() ([]agent, error) {
	if len(c.flags.agents) > 0 {
		return c.namedAgents()
	}
	names, err := c.runningAgents()
	if err != nil {
		return nil, err
	}
	if len(names) > 1 {
		return nil, usagef("there are several agents here (%s): choose with --agent %s, or --agent %s", strings.Join(names, ", "), names[0], allAgents)
	}
	return []agent{c.agentOf(names[0])}, nil
}

// anyAgents are all agents unless --agent chooses, for verbs where none is the wrong one.
func (c *cli) anyAgents() ([]agent, error) {
	if len(c.flags.agents) > 0 {
		return c.namedAgents()
	}
	names, err := c.runningAgents()
	if err != nil {
		return nil, err
	}
	return c.agentsOf(names), nil
}

func (c *cli) namedAgents() ([]agent, error) {
	var chosen []agent
	add := func(a agent) {
		if !slices.ContainsFunc(chosen, func(other agent) bool { return other.Socket() == a.Socket() }) {
			chosen = append(chosen, a)
		}
	}
	for _, name := range c.flags.agents {
		switch {
		case name == "":
			return nil, usagef("--agent is empty: name a node, a socket's path, or %s", allAgents)
		case name == allAgents:
			names, err := c.runningAgents()
			if err != nil {
				return nil, err
			}
			for _, a := range c.agentsOf(names) {
				add(a)
			}
		case strings.ContainsRune(name, filepath.Separator):
			add(agent{strings.TrimSuffix(filepath.Base(name), socketSuffix), admin.NewClient(name)})
		default:
			if err := c.mustExist(name); err != nil {
				return nil, err
			}
			add(c.agentOf(name))
		}
	}
	return chosen, nil
}

// mustExist tells a mistyped node from an agent that does not answer.
func (c *cli) mustExist(name string) error {
	names, err := c.runningAgents()
	if err != nil {
		return err
	}
	if !slices.Contains(names, name) {
		return usagef("there is no agent of node %q in %s, only of %s", name, c.socketDir, strings.Join(names, ", "))
	}
	return nil
}

func (c *cli) agentOf(name string) agent {
	return agent{name, admin.NewClient(filepath.Join(c.socketDir, name+socketSuffix))}
}

func (c *cli) agentsOf(names []string) []agent {
	var agents []agent
	for _, name := range names {
		agents = append(agents, c.agentOf(name))
	}
	return agents
}

// runningAgents lists the sockets of this machine, at least one.
func (c *cli) runningAgents() ([]string, error) {
	entries, err := os.ReadDir(c.socketDir)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("read %s: permission denied: run this as root", c.socketDir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for agents: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), socketSuffix); ok && e.Type() == fs.ModeSocket {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("no agent socket in %s: is raceway-agent running on this node?", c.socketDir)
	}
	return names, nil // ReadDir sorts
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
