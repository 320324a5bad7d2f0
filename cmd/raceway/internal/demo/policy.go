package demo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// policyYAML lets web reach db and nobody else.
func policyYAML(dryRun bool) string {
	annotations := ""
	if dryRun {
		annotations = `
  annotations:
    istio.io/dry-run: "true"`
	}
	return `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: ` + policyName + `
  namespace: ` + namespace + annotations + `
spec:
  selector:
    matchLabels:
      app: db
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/` + namespace + `/sa/web"]
`
}

// policy lets web reach db and nobody else: batch is the wrong client.
func (s *story) policy(ctx context.Context) error {
	if err := s.open(ctx, s.batch, beforePolicy, s.vip); err != nil {
		return err
	}
	if err := s.rehearse(ctx); err != nil {
		return err
	}
	return s.enforce(ctx)
}

// applyPolicy writes the policy and waits until db's agent knows it.
func (s *story) applyPolicy(ctx context.Context, dryRun bool) error {
	if err := s.lab.ApplyFile(policyFile, policyYAML(dryRun)); err != nil {
		return err
	}
	client := s.lab.Agent(s.db.pod.Node).Client()
	defer client.Close()
	return until(ctx, func(ctx context.Context) error {
		all, err := client.Policies(ctx)
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.Namespace == namespace && p.Name == policyName && p.DryRun == dryRun {
				return nil
			}
		}
		return fmt.Errorf("the agent of %s does not know the policy", s.db.pod.Node.Name)
	})
}

// rehearse applies the policy as a dry run: it counts and does nothing.
func (s *story) rehearse(ctx context.Context) error {
	p := s.page
	p.say("batch opens a connection to db:%d and keeps it. Then comes a policy that allows web alone, as a dry run:", dbPort)
	p.block(policyYAML(true))
	if err := s.applyPolicy(ctx, true); err != nil {
		return err
	}
	requests, err := s.watch(ctx, s.batch)
	if err != nil {
		return err
	}
	report, err := s.report(ctx, s.batch, time.Now())
	if err != nil {
		return err
	}
	failed, first := errorsOf(requests)
	if open := report.Lasting[beforePolicy]; failed > 0 || open.Error != "" {
		return fmt.Errorf("a dry run refused %d of batch's %d requests (%s), or cut its connection (%s)", failed, len(requests), first, open.Error)
	}
	if err := s.raceway(ctx, "policies"); err != nil {
		return err
	}
	count, err := s.showDecisions(ctx, `outcome="deny"`, `dry_run="true"`)
	if err != nil {
		return err
	}
	p.good("it would have denied %d connections, and denied none: batch's %d new requests passed, its open connection goes on", count, len(requests))
	return nil
}

// enforce takes the dry run away.
func (s *story) enforce(ctx context.Context) error {
	p := s.page
	p.say("Now without the annotation: in force.")
	start := time.Now()
	s.denied = start
	if err := s.applyPolicy(ctx, false); err != nil {
		return err
	}
	var cut lastingReport
	err := until(ctx, func(ctx context.Context) error {
		r, err := s.report(ctx, s.batch, time.Now())
		if err != nil {
			return err
		}
		if cut = r.Lasting[beforePolicy]; cut.Error == "" {
			return errors.New("batch's open connection goes on")
		}
		return nil
	})
	if err != nil {
		return err
	}
	p.good("batch's open connection was cut %s later: %s", seconds(cut.Ended.Sub(start)), cause(cut.Error))
	since := time.Now()
	refused, err := s.watch(ctx, s.batch)
	if err != nil {
		return err
	}
	failed, first := errorsOf(refused)
	if failed < len(refused) {
		return fmt.Errorf("%d of batch's %d requests passed in spite of the policy", len(refused)-failed, len(refused))
	}
	p.good("batch's new connections are refused, all %d: %s", failed, cause(first))
	allowed, err := s.report(ctx, s.web, since)
	if err != nil {
		return err
	}
	if failed, first := errorsOf(allowed.Requests); failed > 0 || len(allowed.Requests) == 0 {
		return fmt.Errorf("%d of web's %d requests failed: %s", failed, len(allowed.Requests), first)
	}
	if open := allowed.Lasting[underLabel]; open.Error != "" {
		return fmt.Errorf("web's open connection broke: %s", open.Error)
	}
	p.good("web's go on: %d new ones meanwhile, and its open one", len(allowed.Requests))
	if err := s.raceway(ctx, "policies"); err != nil {
		return err
	}
	_, err = s.showDecisions(ctx, `outcome="deny"`, `dry_run="false"`)
	return err
}

// showDecisions shows the line of db's agent's metrics that has all these labels, and
// returns its value.
func (s *story) showDecisions(ctx context.Context, labels ...string) (int, error) {
	text, err := s.lab.Agent(s.db.pod.Node).Metrics(ctx)
	if err != nil {
		return 0, err
	}
	labels = append(labels, `policy="`+policyName+`"`)
	for line := range strings.Lines(text) {
		has := func(label string) bool { return strings.Contains(line, label) }
		if !strings.HasPrefix(line, "raceway_policy_decisions_total{") || slices.ContainsFunc(labels, func(l string) bool { return !has(l) }) {
			continue
		}
		var value float64
		if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &value); err != nil {
			return 0, fmt.Errorf("read the metric %q: %w", strings.TrimSpace(line), err)
		}
		if value == 0 {
			return 0, fmt.Errorf("nothing was counted: %s", strings.TrimSpace(line))
		}
		s.page.say("And the metrics of %s's agent, for Prometheus:", s.db.pod.Node.Name)
		s.page.block(line)
		return int(value), nil
	}
	return 0, fmt.Errorf("the metrics of %s's agent have no raceway_policy_decisions_total with %s", s.db.pod.Node.Name, strings.Join(labels, ", "))
}
