package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/explain"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
)

// backend answers the admin API from the agent's parts.
type backend struct {
	*Agent
}

var _ admin.Backend = backend{}

var errNoSnapshot = admin.NotReady("the agent has no complete view of the cluster yet: look at its log if it stays so")

func (b backend) snapshot() (*dataplane.Snapshot, error) {
	s, _ := b.store.Load()
	if s == nil {
		return nil, errNoSnapshot
	}
	return s, nil
}

// Workloads lists every pod of the cluster, with the capture of those on this node.
func (b backend) Workloads(context.Context) ([]admin.Workload, error) {
	s, err := b.snapshot()
	if err != nil {
		return nil, err
	}
	status := b.reconciler.Status()
	rows := make([]admin.Workload, 0, len(s.Workloads()))
	for _, w := range s.Workloads() {
		row := admin.Workload{
			Namespace: w.Name.Namespace, Name: w.Name.Name, Addrs: w.Addrs, Node: w.Node,
			Identity: w.Identity, Protocol: w.Protocol(), Enrolled: w.Enrolled,
		}
		if st, ok := status[w.UID]; ok {
			row.Capture, row.Reason, row.Since = st.State, st.Reason, st.Since
		}
		if pod := b.pods.get(w.UID); pod != nil {
			row.Bypassing = pod.Bypassing()
			if row.OlderUDP, err = pod.OlderUDP(); err != nil {
				return nil, err
			}
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// Services lists the services of the cluster.
func (b backend) Services(context.Context) ([]admin.Service, error) {
	s, err := b.snapshot()
	if err != nil {
		return nil, err
	}
	rows := make([]admin.Service, 0, len(s.Services()))
	for _, svc := range s.Services() {
		row := admin.Service{Namespace: svc.Name.Namespace, Name: svc.Name.Name, Addrs: slices.Concat(svc.Addrs, svc.External)}
		for _, p := range svc.Ports {
			row.Ports = append(row.Ports, p.Port)
		}
		pods := make(map[string]bool) // a pod of two families is one endpoint to people
		for _, e := range svc.Endpoints {
			w := s.Workload(e.WorkloadUID)
			if w != nil && pods[w.UID] {
				continue
			}
			row.Endpoints++
			if e.Ready {
				row.Ready++
			}
			if w != nil {
				pods[w.UID] = true
				if w.Captured {
					row.Captured++
				}
			}
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(x, y admin.Service) int {
		return cmp.Or(cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name))
	})
	return rows, nil
}

// Policies lists the policies of the cluster and what they decided on this node.
func (b backend) Policies(context.Context) ([]admin.Policy, error) {
	s, err := b.snapshot()
	if err != nil {
		return nil, err
	}
	var rows []admin.Policy
	for i := range s.AuthorizationPolicies() {
		p := &s.AuthorizationPolicies()[i]
		d := b.telemetry.PolicyCounts(string(authz.KindAuthorization), p.Name, p.DryRun)
		rows = append(rows, admin.Policy{
			Kind: string(authz.KindAuthorization), Namespace: p.Name.Namespace, Name: p.Name.Name,
			Action: string(p.Action), DryRun: p.DryRun, Issues: authz.Issues(p),
			Allowed: d.Allowed, Denied: d.Denied,
			Workloads: b.selected(s, func(w *dataplane.Workload) bool { return authz.Applies(s, p, w) }),
		})
	}
	for i := range s.PeerAuthentications() {
		p := &s.PeerAuthentications()[i]
		d := b.telemetry.PolicyCounts(string(authz.KindAuthentication), p.Name, false)
		rows = append(rows, admin.Policy{
			Kind: string(authz.KindAuthentication), Namespace: p.Name.Namespace, Name: p.Name.Name,
			Action: string(p.Mode), Allowed: d.Allowed, Denied: d.Denied, Issues: authz.AuthenticationIssues(s, p),
			Workloads: b.selected(s, func(w *dataplane.Workload) bool { return authz.AuthenticationApplies(s, p, w) }),
		})
	}
	return rows, nil
}

func (b backend) selected(s *dataplane.Snapshot, applies func(*dataplane.Workload) bool) int {
	n := 0
	for i := range s.Workloads() {
		if w := &s.Workloads()[i]; w.Node == b.cfg.Node && w.Enrolled && applies(w) {
			n++
		}
	}
	return n
}

// Certificates lists the certificates of this node's pods.
func (b backend) Certificates(context.Context) ([]admin.Certificate, error) {
	status := b.keeper.Status()
	rows := make([]admin.Certificate, 0, len(status))
	for _, st := range status {
		row := admin.Certificate{
			Identity: st.Identity, State: string(st.State), Serial: st.Serial,
			NotBefore: st.NotBefore, NotAfter: st.NotAfter, RefreshAt: st.RefreshAt,
		}
		if st.LastError != nil {
			row.Error = st.LastError.Error()
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// Connections lists the live connections that the proxy carries.
func (b backend) Connections(context.Context) ([]admin.Connection, error) {
	return b.telemetry.Connections(), nil
}

// Flows emits flow records.
func (b backend) Flows(ctx context.Context, follow bool, emit func(admin.Flow) error) error {
	return b.telemetry.Flows(ctx, follow, emit)
}

// Why explains what would become of a connection.
func (b backend) Why(_ context.Context, q admin.WhyQuery) (admin.Why, error) {
	s, _ := b.store.Load()
	status := b.reconciler.Status()
	return explain.Explain(explain.Question{
		Snapshot: s,
		Node:     b.cfg.Node,
		Capture: func(uid string) (dataplane.CaptureState, string) {
			return status[uid].State, status[uid].Reason
		},
		Certificate: func(id spiffe.ID) error {
			_, err := b.keeper.ClientTLS(id, nil)
			return err
		},
		SameNode:    b.sameNodeJudge(s),
		Source:      q.Source,
		Destination: q.Destination,
		From:        q.From,
	})
}

// Check proves the capture of every pod of this node that claims it.
func (b backend) Check(ctx context.Context) ([]admin.Finding, error) {
	findings := b.checkAgent()
	s, _ := b.store.Load()
	var from *servedPod
	for uid, st := range b.reconciler.Status() {
		subject := uid
		var w *dataplane.Workload
		if s != nil {
			if w = s.Workload(uid); w != nil {
				subject = w.Name.String()
			}
		}
		if st.State != dataplane.CaptureInForce {
			findings = append(findings, admin.Finding{
				Subject: subject, Check: "capture", OK: st.State == dataplane.CaptureReleasing,
				Detail: st.State.String() + ": " + st.Reason,
			})
			continue
		}
		pod := b.pods.get(uid)
		if pod == nil {
			continue
		}
		for _, f := range pod.Check(ctx) {
			findings = append(findings, admin.Finding{Subject: subject, Check: f.Check, OK: f.OK, Detail: f.Detail})
		}
		if err := pod.udpTrouble(); err != nil && b.udp.not() == nil {
			findings = append(findings, admin.Finding{Subject: subject, Check: "udp", Detail: err.Error()})
		}
		if w != nil {
			f := b.pods.probe(ctx, w, pod)
			f.Subject = subject
			findings = append(findings, f)
			from = pod
		}
	}
	if from != nil {
		findings = append(findings, b.pods.probePeers(ctx, s, b.cfg.Node, from)...)
	}
	slices.SortStableFunc(findings, func(x, y admin.Finding) int {
		return cmp.Or(cmp.Compare(rank(x.Subject), rank(y.Subject)), cmp.Compare(x.Subject, y.Subject))
	})
	return findings, nil
}

const agentSubject = "agent"

// rank puts the agent before its pods.
func rank(subject string) int {
	if subject == agentSubject {
		return 0
	}
	return 1
}

func (b backend) checkAgent() []admin.Finding {
	s, err := b.snapshot()
	if err == nil {
		err = knowsNode(s, b.cfg.Node)
	}
	findings := []admin.Finding{finding("cluster state", err)}
	for _, p := range b.source.Problems() {
		findings = append(findings, admin.Finding{Subject: agentSubject, Check: "discovery", Detail: p.String()})
	}
	if b.cluster != nil {
		findings = append(findings, finding("API server", stale(b.cluster.Staleness())))
	}
	if s != nil {
		for _, issue := range samenode.Issues(s) {
			findings = append(findings, admin.Finding{Subject: agentSubject, Check: "same node", Detail: issue})
		}
		for _, issue := range udpIssues(s) {
			findings = append(findings, admin.Finding{Subject: agentSubject, Check: "udp", Detail: issue})
		}
		findings = append(findings, b.checkUDP(s)...)
	}
	if b.plugin != nil && !b.released.Load() {
		findings = append(findings, finding("CNI plugin", b.plugin.check()))
	}
	for _, st := range b.keeper.Status() {
		findings = append(findings, finding("certificate "+st.Identity.String(), st.LastError))
	}
	return findings
}

// checkUDP says whether UDP is captured on this node, which need not be.
func (b backend) checkUDP(s *dataplane.Snapshot) []admin.Finding {
	f := admin.Finding{Subject: agentSubject, Check: "udp", OK: true}
	why := b.udp.not()
	if why == nil {
		return []admin.Finding{f}
	}
	f.Detail = fmt.Sprintf("the UDP of this node's pods is not captured and goes in clear: %v", why)
	findings := []admin.Finding{f}
	fate := "it is dropped"
	if b.udp.off {
		fate = "it goes in clear"
	}
	for _, ns := range unmetUDP(s, b.cfg.Node) {
		findings = append(findings, admin.Finding{
			Subject: agentSubject, Check: "udp",
			Detail: fmt.Sprintf("namespace %s requires tunnels for what its pods send by UDP, which this node cannot give: %s", ns, fate),
		})
	}
	return findings
}

// finding is one about the agent itself, of what err says is wrong.
func finding(check string, err error) admin.Finding {
	f := admin.Finding{Subject: agentSubject, Check: check, OK: err == nil}
	if err != nil {
		f.Detail = err.Error()
	}
	return f
}

// stale complains of an API server that has not answered for longer than a hiccup.
func stale(since time.Duration) error {
	if since < 10*time.Second {
		return nil
	}
	return fmt.Errorf("it has not answered for %v: what was known last stays in force, also of policies", since.Round(time.Second))
}

// Version says what runs here.
func (b backend) Version(context.Context) (admin.Version, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return admin.Version{}, err
	}
	return admin.Version{
		Version: b.cfg.Version,
		Node:    b.cfg.Node,
		Kernel:  unix.ByteSliceToString(uts.Release[:]),
		Inbound: string(b.datapath.InboundMode()),
	}, nil
}

// LogLevel is the level in force.
func (b backend) LogLevel(context.Context) (slog.Level, error) { return b.cfg.Level.Level(), nil }

// SetLogLevel changes it at once.
func (b backend) SetLogLevel(_ context.Context, level slog.Level) error {
	b.cfg.Level.Set(level)
	b.cfg.Log.Info("log level", "level", level)
	return nil
}
