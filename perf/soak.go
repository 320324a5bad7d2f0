package perf

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
)

const (
	// soakClients is how many things of the mixed load happen at once.
	soakClients = 32
	// endTime is for the load to end everywhere.
	endTime = 5 * time.Second
	// policyInterval is between two changes of policies.
	policyInterval = 2 * time.Second
	// What may be more after a long load than after a short one: pools breathe.
	goroutineSlack, descriptorSlack, residentSlack = 50, 50, 48 << 20
)

// Vitals is what an agent holds when no load is on.
type Vitals struct {
	Goroutines  int    `json:"goroutines"`
	Descriptors int    `json:"descriptors"`
	RSS         uint64 `json:"rssBytes"`
}

// SoakReport is what a soak found: before is after a short warm-up, after the load's end.
type SoakReport struct {
	Duration      time.Duration       `json:"durationNanos"`
	PolicyChanges int                 `json:"policyChanges"`
	Load          traffic.MixedResult `json:"load"`
	Before        map[string]Vitals   `json:"before"` // by node
	After         map[string]Vitals   `json:"after"`
}

// Soak puts a mixed load on the mesh, across nodes, for a long time, while policies that
// never cease to allow it change. It fails when anything is lost or changed on the way, and
// when an agent holds more in the end than a short load leaves behind.
func Soak(ctx context.Context, c Config, d time.Duration) (*SoakReport, error) {
	scenario := Scenario{Name: "hbone-cross", Title: "HBONE, across nodes", Mesh: true}
	c.Scenarios = []string{scenario.Name}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	found := &SoakReport{Duration: d}
	err := onSite(ctx, c, scenario, func(st *site) error { return st.soak(ctx, d, found) })
	if err != nil {
		return nil, fmt.Errorf("soak: %w", err)
	}
	return found, found.leaks()
}

func (st *site) soak(ctx context.Context, d time.Duration, found *SoakReport) (err error) {
	if err := st.verify(ctx); err != nil {
		return err
	}
	if _, err := st.mixed(ctx, min(d/4, 20*time.Second)); err != nil {
		return err
	}
	if found.Before, err = st.vitals(ctx); err != nil {
		return err
	}
	st.config.Log.Info("soak", "duration", d, "before", found.Before)
	group, loadCtx := errgroup.WithContext(ctx)
	over, end := context.WithCancel(loadCtx)
	group.Go(func() (err error) {
		found.PolicyChanges, err = st.changePolicies(over)
		return err
	})
	group.Go(func() (err error) {
		defer end()
		found.Load, err = st.mixed(loadCtx, d)
		return err
	})
	err = group.Wait()
	end()
	if err != nil {
		return fmt.Errorf("%w%s", err, st.witnesses(err))
	}
	found.After, err = st.vitals(ctx)
	return err
}

// clientEnd is the client's address in an error of package net.
var clientEnd = regexp.MustCompile(`\S+:\d+->`)

// witnesses is what the agents have logged of the connection that err is about, to go behind it.
func (st *site) witnesses(err error) string {
	client := strings.TrimSuffix(clientEnd.FindString(err.Error()), "->")
	if client == "" {
		return ""
	}
	said := ""
	for _, n := range st.lab.Nodes() {
		a := st.lab.Agent(n)
		if a == nil {
			continue
		}
		content, err := os.ReadFile(a.Log)
		if err != nil {
			said += fmt.Sprintf("; the log of the agent of %s: %v", n.Name, err)
			continue
		}
		for line := range strings.Lines(string(content)) {
			if strings.Contains(line, client) {
				said += fmt.Sprintf("\n\t%s: %s", n.Name, strings.TrimSpace(line))
			}
		}
	}
	return said
}

// mixed runs the load in the client's pod.
func (st *site) mixed(ctx context.Context, d time.Duration) (traffic.MixedResult, error) {
	argument, err := json.Marshal(task{To: st.target(), Duration: d, Conns: soakClients})
	if err != nil {
		return traffic.MixedResult{}, fmt.Errorf("write the task: %w", err)
	}
	w, err := st.startWorker(st.client, "mix", string(argument))
	if err != nil {
		return traffic.MixedResult{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, d+3*setupTimeout)
	defer cancel()
	line, err := w.line(ctx)
	if err != nil {
		return traffic.MixedResult{}, err
	}
	var found traffic.MixedResult
	if err := json.Unmarshal([]byte(line), &found); err != nil {
		return found, fmt.Errorf("read what the load came to %q: %w", line, err)
	}
	return found, w.process.Wait(ctx)
}

// mixWorker is the process of mixed.
func mixWorker(ctx context.Context, t task, out io.Writer) error {
	found, err := traffic.Mixed(ctx, t.To, t.Conns, t.Duration)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(found)
}

// changePolicies changes them until ctx ends. Each state allows the client.
func (st *site) changePolicies(ctx context.Context) (changes int, err error) {
	const file = "soak.yaml"
	for ticker := time.NewTicker(policyInterval); ; changes++ {
		select {
		case <-ctx.Done():
			ticker.Stop()
			return changes, st.lab.DeleteFile(file)
		case <-ticker.C:
		}
		if changes%4 == 3 {
			err = st.lab.DeleteFile(file)
		} else {
			err = st.lab.ApplyFile(file, manyPolicies(1+changes%4*rulesPerPolicy))
		}
		if err != nil {
			return changes, err
		}
	}
}

// vitals asks every agent, after the load had time to end everywhere.
func (st *site) vitals(ctx context.Context) (map[string]Vitals, error) {
	select {
	case <-time.After(endTime):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	all := make(map[string]Vitals)
	for _, n := range st.lab.Nodes() {
		a := st.lab.Agent(n)
		if a == nil {
			continue
		}
		v, err := vitalsOf(ctx, a)
		if err != nil {
			return nil, err
		}
		all[n.Name] = v
	}
	return all, nil
}

func vitalsOf(ctx context.Context, a *lab.Agent) (Vitals, error) {
	u, err := a.Usage()
	if err != nil {
		return Vitals{}, err
	}
	metrics, err := a.Metrics(ctx)
	if err != nil {
		return Vitals{}, err
	}
	return Vitals{Goroutines: int(gauge(metrics, "go_goroutines")), Descriptors: u.FDs, RSS: u.RSS}, nil
}

// leaks complains of every agent that holds more than it did.
func (r *SoakReport) leaks() error {
	var errs []error
	for node, after := range r.After {
		before := r.Before[node]
		if after.Goroutines > before.Goroutines+goroutineSlack {
			errs = append(errs, fmt.Errorf("the agent of %s leaks goroutines: %d, after %d", node, after.Goroutines, before.Goroutines))
		}
		if after.Descriptors > before.Descriptors+descriptorSlack {
			errs = append(errs, fmt.Errorf("the agent of %s leaks descriptors: %d, after %d", node, after.Descriptors, before.Descriptors))
		}
		if after.RSS > before.RSS+before.RSS/2+residentSlack {
			errs = append(errs, fmt.Errorf("the agent of %s leaks memory: %.0f MiB resident, after %.0f", node, mebibytes(after.RSS), mebibytes(before.RSS)))
		}
	}
	return errors.Join(errs...)
}
