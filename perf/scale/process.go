package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"
)

// source is a process that runs runSource.
type source struct {
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	started time.Time
	log     bytes.Buffer // read it after ended
	events  chan event   // all but what await takes; closed at the end
	ended   chan struct{}

	mu        sync.Mutex
	published time.Time
	current   time.Time
	changed   chan struct{} // closed at the next event, by mu
	stats     *stats
}

// sourceOptions say what kind of source.
type sourceOptions struct {
	node     int
	list     bool     // and not a streamed list (WatchList)
	file     string   // of the last good snapshot
	pods     []string // UIDs to tell of
	readFile bool     // the file is there
}

// start starts a source. The caller stops it.
func (s *site) start(ctx context.Context, o sourceOptions) (*source, error) {
	args := append(s.config.Self[1:len(s.config.Self):len(s.config.Self)], "source",
		"-kubeconfig", s.plane.Kubeconfig(), "-node", nodeName(o.node), "-snapshot-file", o.file, "-pods", strings.Join(o.pods, ","))
	p := &source{
		cmd: exec.CommandContext(ctx, s.config.Self[0], args...), started: time.Now(),
		events: make(chan event, 1024), ended: make(chan struct{}), changed: make(chan struct{}),
	}
	p.cmd.Env = append(p.cmd.Environ(), "KUBE_FEATURE_WatchListClient="+strconv.FormatBool(!o.list))
	p.cmd.Stderr = &p.log
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.plane.Start(p.cmd); err != nil {
		return nil, fmt.Errorf("start a source: %w", err)
	}
	go p.read(out)
	return p, nil
}

// read takes in the events until the process ends.
func (p *source) read(out io.Reader) {
	defer close(p.ended)
	defer close(p.events)
	lines := json.NewDecoder(out)
	for {
		var e event
		if err := lines.Decode(&e); err != nil {
			return
		}
		p.mu.Lock()
		switch {
		case e.Published:
			p.published = e.At
		case e.Current:
			p.current = e.At
		case e.Stats != nil:
			p.stats = e.Stats
		default:
			p.events <- e
		}
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
}

// await waits until what it is given is true of the source.
func (p *source) await(ctx context.Context, what string, is func() bool) error {
	for {
		p.mu.Lock()
		done, changed := is(), p.changed
		p.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-p.ended:
			return fmt.Errorf("a source ended before %s: %s", what, p.log.String())
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
		}
	}
}

// ask returns the source's stats as they are now.
func (p *source) ask(ctx context.Context) (stats, error) {
	p.mu.Lock()
	p.stats = nil
	p.mu.Unlock()
	if _, err := io.WriteString(p.stdin, "\n"); err != nil {
		return stats{}, fmt.Errorf("ask a source: %w", err)
	}
	err := p.await(ctx, "its stats", func() bool { return p.stats != nil })
	if err != nil {
		return stats{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return *p.stats, nil
}

// stop ends the source: it goes when nobody can ask it any more.
func (p *source) stop() error {
	err := p.stdin.Close()
	<-p.ended
	return errors.Join(err, p.cmd.Wait())
}

// clockTick is the unit of /proc/PID/stat: USER_HZ is 100 on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// cpuTime is what a process has used, of user and system time.
func cpuTime(pid int) (time.Duration, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read a process's CPU time: %w", err)
	}
	// The command's name, in parentheses, may hold anything.
	_, rest, _ := strings.Cut(string(content[bytes.LastIndexByte(content, ')'):]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0, fmt.Errorf("read a process's CPU time: /proc/%d/stat is %q", pid, content)
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	system, other := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * clockTick, errors.Join(err, other)
}

// memory is a process's resident set in bytes, now and at most.
func memory(pid int) (now, most uint64, err error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("read a process's memory: %w", err)
	}
	for line := range strings.Lines(string(content)) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != "VmRSS:" && fields[0] != "VmHWM:" {
			continue
		}
		kib, err := strconv.ParseUint(fields[1], 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("read a process's memory: %w", err)
		}
		if fields[0] == "VmRSS:" {
			now = kib << 10
		} else {
			most = kib << 10
		}
	}
	return now, most, nil
}

// received is what a process has read, which is little beside what came by its connections.
func received(pid int) (uint64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0, fmt.Errorf("read what a process has read: %w", err)
	}
	var n uint64
	if _, err := fmt.Sscanf(string(content), "rchar: %d", &n); err != nil {
		return 0, fmt.Errorf("read what a process has read: /proc/%d/io is %q: %w", pid, content, err)
	}
	return n, nil
}
