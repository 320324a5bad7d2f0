package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// startingFor is how long an agent's garbage is that of its start.
	startingFor = 3 * time.Second
	// settleAfter is how long after its start an agent gives back what only the start needed,
	// or later if it is busy.
	settleAfter = 15 * time.Second
)

// manageHeap keeps memory to what the agent does, until ctx ends. After its start and after each
// busy time it gives the node back what that took and resting does not: the heap, and the pages
// of the program that hold what ran.
func (a *Agent) manageHeap(ctx context.Context) error {
	c := newCollector(a.cfg.PaceCollector)
	defer c.restore()
	started, settle := time.After(startingFor), time.After(settleAfter)
	var calm <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-started:
			c.watch(ctx)
		case now := <-settle:
			if !c.quiet(now) { // it would be in the way of connections
				settle = time.After(busyCycle)
				continue
			}
			a.rest(c)
		case <-c.cycles:
			calm = c.cycled(time.Now())
		case <-calm:
			calm = nil
			a.rest(c)
		}
	}
}

// rest gives back what an agent at rest does not use.
func (a *Agent) rest(c *collector) {
	c.rest()
	if err := forgetProgram("/proc/self/smaps"); err != nil {
		a.cfg.Log.Debug("give the program's pages back", "error", err)
	}
}

// forgetProgram takes the program's code and constants out of this process's memory; the
// kernel has them in its cache, and maps those that run again 64 KiB at a time. Half of what
// the agent holds after its start is code of that kind: programs are verified, objects of
// every kind registered, tables built.
func forgetProgram(smaps string) error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("find the program: %w", err)
	}
	mappings, err := cleanMappings(smaps, program)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mappings {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); errno != 0 {
			errs = append(errs, fmt.Errorf("madvise %x-%x: %w", m.start, m.end, errno))
		}
	}
	return errors.Join(errs...)
}

// mapping is a part of this process's memory.
type mapping struct{ start, end uintptr }

// cleanMappings are those of a file that nothing is written to: no page of them differs from
// the file's, as one with a relocation or a breakpoint would.
func cleanMappings(smaps, file string) ([]mapping, error) {
	f, err := os.Open(smaps)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var (
		clean []mapping
		last  mapping
		ours  bool
	)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		if !strings.HasSuffix(fields[0], ":") { // the head of a mapping: 00400000-01d37000 r-xp 00000000 08:01 123 /path
			ours = len(fields) == 6 && fields[5] == file && strings.HasPrefix(fields[1], "r-")
			if _, err := fmt.Sscanf(fields[0], "%x-%x", &last.start, &last.end); err != nil {
				return nil, fmt.Errorf("read %s: %w", smaps, err)
			}
			continue
		}
		if ours && fields[0] == "Anonymous:" && fields[1] == "0" {
			clean = append(clean, last)
		}
	}
	return clean, lines.Err()
}
