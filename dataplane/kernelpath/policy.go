package kernelpath

import (
	"errors"
	"fmt"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// recheck decides live connections again and cuts those that are denied now, or that must be
// encrypted. Connections of pods that were released go on.
func (p *Paths) recheck() {
	j := p.now()
	if j == nil {
		return
	}
	for _, c := range p.connections {
		w := j.Snapshot.Workload(c.server)
		if c.cut != nil || w == nil || !j.InForce(c.server) {
			continue
		}
		v := j.Rules(w).Evaluate(c.request)
		p.count(c, v, false)
		if !v.Allowed {
			p.cut(c, denial("policy changed", v))
			continue
		}
		source := j.Snapshot.Workload(c.Client)
		if source == nil || !j.InForce(c.Client) {
			continue
		}
		if why := j.Encrypted(source, w, c.To.Port()); why != "" {
			p.cut(c, errors.New("policy changed: it is not encrypted, and "+why))
		}
	}
}

// cut ends c; its end is told by an event.
func (p *Paths) cut(c *connection, why error) {
	c.cut = why
	if err := p.cfg.Kernel.Cut(c.ID); err != nil {
		p.cfg.Log.Error("cut a connection that policy denies: its data is stopped, its sockets may live on", "error", err)
	}
}

// count counts a decision of policy: the first one of a connection, later ones that deny it,
// and dry runs that change their minds.
func (p *Paths) count(c *connection, v authz.Verdict, first bool) {
	if first || !v.Allowed {
		p.cfg.Telemetry.Decided(telemetry.Decision{Kind: string(v.Kind), Policy: v.Policy, Allowed: v.Allowed})
	}
	before := c.dryRun
	c.dryRun = nil
	for _, d := range v.DryRun {
		if c.dryRun == nil {
			c.dryRun = make(map[dataplane.Name]bool, len(v.DryRun))
		}
		c.dryRun[d.Policy] = d.WouldDeny
		if denied, counted := before[d.Policy]; !counted || denied != d.WouldDeny {
			p.cfg.Telemetry.Decided(telemetry.Decision{Kind: string(authz.KindAuthorization), Policy: d.Policy, Allowed: !d.WouldDeny, DryRun: true})
		}
	}
}

// denial says which policy and rule decided, in the proxy's words.
func denial(deed string, v authz.Verdict) error {
	if v.Kind == "" {
		return fmt.Errorf("%s: %s", deed, v.Reason)
	}
	return fmt.Errorf("%s: %s: %s", deed, policyText(v), v.Reason)
}

// policyText is "namespace/name rule 0", and "" when no policy decided.
func policyText(v authz.Verdict) string {
	switch {
	case v.Kind == "":
		return ""
	case v.Rule < 0:
		return v.Policy.String()
	}
	return fmt.Sprintf("%s rule %d", v.Policy, v.Rule)
}
