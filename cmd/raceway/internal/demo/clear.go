package demo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

// clear ends and removes everything, and proves it.
func (s *story) clear(ctx context.Context) error {
	objects, err := s.bpfObjects()
	if err != nil {
		return errors.Join(err, s.lab.Close())
	}
	s.page.heading("And nothing remains")
	if err := s.lab.Close(); err != nil {
		return fmt.Errorf("remove the lab: %w", err)
	}
	if remains := s.lab.Leftovers(); len(remains) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(remains, "; "))
	}
	s.page.good("no process, no network namespace, no link, no mount, no file of it")
	if len(objects) == 0 {
		return nil // it did not come to that
	}
	// The kernel frees them a moment after the last descriptor and pin went.
	err = until(ctx, func(context.Context) error { return anyAlive(objects) })
	if err != nil {
		return err
	}
	s.page.good("none of the %d BPF programs, maps and links that the agents held", len(objects))
	return nil
}

// bpfObjects are those that the agents hold.
func (s *story) bpfObjects() ([]object, error) {
	all := make(map[object]bool)
	for _, n := range s.lab.Nodes() {
		agent := s.lab.Agent(n)
		if agent == nil || !agent.Running() {
			continue
		}
		found, err := objectsOf(agent.Pid())
		if errors.Is(err, os.ErrNotExist) {
			continue // it has just ended
		}
		if err != nil {
			return nil, err
		}
		maps.Copy(all, found)
	}
	return slices.Collect(maps.Keys(all)), nil
}

// anyAlive is an error as long as the kernel knows one of the objects.
func anyAlive(objects []object) error {
	var alive []string
	for _, o := range objects {
		exists, err := bpfObjectExists(o.kind, o.id)
		if err != nil {
			return err
		}
		if exists {
			alive = append(alive, o.String())
		}
	}
	if len(alive) == 0 {
		return nil
	}
	return fmt.Errorf("left behind: %s", strings.Join(alive, ", "))
}
