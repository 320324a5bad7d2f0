// Package install puts Raceway's CNI plugin on a node and keeps it there: the binary, its
// entry in the network configuration that the container runtime uses, and the state that it
// decides by when the agent is away. Remove takes all of it off again.
//
// The agent that goes leaves everything in place: without the entry, pods that start until the
// next agent runs would send plaintext.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/certs/filewatch"
	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// How the directory is shared with others that write to it. A network plugin's own restart
// writes its configuration once; one that writes again each time it sees ours does not stop.
const (
	maxInsertions = 5                // into one file,
	window        = 10 * time.Minute // in this time: then it is left alone
	truce         = time.Hour        // for this long
	firstBackOff  = time.Second      // before the second insertion; doubled for each further one
	retry         = 5 * time.Second  // after an error
	lookInterval  = 10 * time.Second // while nothing seems to change: the plugin itself is not watched
)

// Config says where things are. Paths are as this process sees them.
type Config struct {
	ConfDir  string // network configuration, /etc/cni/net.d of the host
	BinDir   string // plugins, /opt/cni/bin of the host
	StateDir string // the plugin's state; the host must have it at the same path
	Binary   string // the plugin, to copy from
	Entry    conf.Entry
	Log      *slog.Logger
}

// Installer keeps the plugin installed.
type Installer struct {
	config Config

	mu       sync.Mutex
	problems []discovery.Problem // of the last pass
	inPlace  bool

	// What follows belongs to Run.
	settled bool                   // a pass has succeeded
	inserts map[string][]time.Time // by name of the file, in the window
	truces  map[string]time.Time   // their ends
}

// New does nothing yet.
func New(c Config) *Installer {
	return &Installer{
		config:   c,
		problems: []discovery.Problem{{Where: c.ConfDir, Cause: "the CNI plugin is not installed yet"}},
		inserts:  make(map[string][]time.Time),
		truces:   make(map[string]time.Time),
	}
}

// InPlace reports whether new pods go through the plugin, as far as this agent has seen.
func (i *Installer) InPlace() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.inPlace
}

// Problems lists what keeps the plugin from being in place, in words. Safe for concurrent use.
func (i *Installer) Problems() []discovery.Problem {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.problems
}

// Run installs the plugin and keeps it installed until ctx ends; then it leaves it there and
// returns nil. The state must be written for it to begin.
func (i *Installer) Run(ctx context.Context) (err error) {
	if err := os.MkdirAll(i.config.ConfDir, 0o755); err != nil {
		return fmt.Errorf("create the directory of the network configuration: %w", err)
	}
	watch, err := filewatch.New(i.config.ConfDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, watch.Close()) }()
	changed := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	var watchErr error
	watching.Go(func() {
		defer cancel() // without it nothing is kept: the caller is to know
		watchErr = watch.Run(ctx, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	})
	i.keep(ctx, changed)
	cancel()
	watching.Wait()
	return watchErr
}

func (i *Installer) keep(ctx context.Context, changed <-chan struct{}) {
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again.C:
		}
		wait := i.pass(time.Now())
		if wait <= 0 {
			wait = lookInterval
		}
		again.Reset(wait)
	}
}

// pass looks at what is on the node and mends it. It returns when to come again although
// nothing has changed, 0 when there is no hurry.
func (i *Installer) pass(now time.Time) (wait time.Duration) {
	var where, cause string
	err := withLock(i.config.ConfDir, func() (err error) {
		where, wait, err = i.mend(now)
		return err
	})
	if err != nil {
		cause = err.Error()
		wait = max(wait, retry)
	}
	var refused *refusedError
	if errors.As(err, &refused) {
		wait = refused.wait
	}
	i.note(where, cause)
	return wait
}

// note keeps what a pass has found, and logs it when it is new.
func (i *Installer) note(where, cause string) {
	var problems []discovery.Problem
	if cause != "" {
		problems = []discovery.Problem{{Where: where, Cause: cause}}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	was := i.problems
	i.problems, i.inPlace = problems, cause == ""
	if cause != "" && (len(was) == 0 || was[0] != problems[0]) {
		i.config.Log.Warn("CNI plugin is not in place", "where", where, "cause", cause)
	}
	if cause == "" && len(was) > 0 {
		i.config.Log.Info("CNI plugin is in place", "file", where)
	}
}

// refusedError is an insertion that is put off so as not to fight another program.
type refusedError struct {
	wait  time.Duration
	cause string
}

func (e *refusedError) Error() string { return e.cause }

// mend returns what an error is about.
func (i *Installer) mend(now time.Time) (where string, wait time.Duration, err error) {
	c := &i.config
	if !i.settled {
		if err := errors.Join(removeTemps(c.ConfDir), os.MkdirAll(c.BinDir, 0o755), removeTemps(c.BinDir)); err != nil {
			return c.ConfDir, 0, fmt.Errorf("tidy up: %w", err)
		}
	}
	// Without a state the plugin would hold up every pod as soon as the agent is away.
	if _, err := os.Stat(filepath.Join(c.StateDir, stateName)); err != nil {
		return c.StateDir, time.Second, fmt.Errorf("the agent has not written what it knows of the cluster yet: %w", err)
	}
	binary := filepath.Join(c.BinDir, conf.PluginType)
	if err := i.copyBinary(binary); err != nil {
		return binary, 0, fmt.Errorf("copy the plugin: %w", err)
	}
	name, err := active(c.ConfDir)
	if err != nil {
		return c.ConfDir, 0, err
	}
	path := filepath.Join(c.ConfDir, name)
	if err := i.insert(name, now); err != nil {
		return path, 0, err
	}
	i.settled = true
	return path, 0, nil
}

// copyBinary puts this agent's version there when it begins. Later it only puts back what is
// missing: during an upgrade another agent's is there by right.
func (i *Installer) copyBinary(to string) error {
	if _, err := os.Stat(to); err == nil && i.settled {
		return nil
	}
	is, err := os.ReadFile(to)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	want, err := os.ReadFile(i.config.Binary)
	if err != nil || bytes.Equal(is, want) {
		return err
	}
	// By rename: a plugin that runs keeps the file that it was started from.
	return put(to, want, 0o755, nil)
}

// insert puts the entry into the file unless another program takes it out each time.
func (i *Installer) insert(name string, now time.Time) error {
	dir := i.config.ConfDir
	var recent []time.Time
	for _, t := range i.inserts[name] {
		if now.Sub(t) < window {
			recent = append(recent, t)
		}
	}
	if present(dir, name) {
		// Since when it has been there is not known: the others' turn may come yet.
		_, err := insert(dir, name, i.config.Entry, !i.settled)
		return err
	}
	if end, ok := i.truces[name]; ok && now.Before(end) {
		return i.stopped(name, now, end)
	}
	delete(i.truces, name)
	if len(recent) >= maxInsertions {
		end := now.Add(truce)
		i.truces[name] = end
		delete(i.inserts, name)
		return i.stopped(name, now, end)
	}
	if n := len(recent); n > 0 {
		if wait := recent[n-1].Add(firstBackOff << (n - 1)).Sub(now); wait > 0 {
			return &refusedError{wait, "another program took out the entry of " + conf.PluginType + ", which is put back in a moment" + i.hint(name)}
		}
	}
	done, err := insert(dir, name, i.config.Entry, true)
	if done && err == nil {
		i.inserts[name] = append(recent, now)
		i.config.Log.Info("CNI plugin put into the network configuration", "file", filepath.Join(dir, name), "insertions", len(i.inserts[name]))
	}
	return err
}

func present(dir, name string) bool {
	text, err := os.ReadFile(filepath.Join(dir, name))
	return err == nil && isList(name) && conf.Has(text, conf.PluginType)
}

func (i *Installer) stopped(name string, now, end time.Time) error {
	return &refusedError{end.Sub(now), fmt.Sprintf("another program took out the entry of %s %d times within %v: it is left out until %s, and pods that start meanwhile are captured only after they have started%s",
		conf.PluginType, maxInsertions, window, end.UTC().Format(time.RFC3339), i.hint(name))}
}

// hint names who it may be and what to set.
func (i *Installer) hint(name string) string {
	if ciliumAtWork(i.config.ConfDir, name) {
		return "; Cilium keeps the directory for itself: set cni.exclusive=false in its Helm values (cni-exclusive: \"false\" in the ConfigMap cilium-config) and restart its agents"
	}
	return ""
}
