package agent

import (
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/discovery/kube"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

func (a *Agent) newCluster() error {
	source, err := kube.New(kube.Config{
		Kubeconfig: a.cfg.Kubeconfig, Node: a.cfg.Node, Pod: a.cfg.Pod, Cluster: a.cfg.ClusterID,
		TrustDomain: a.cfg.TrustDomain, RootNamespace: a.cfg.RootNamespace, EnrollLabels: a.cfg.EnrollLabels,
		SnapshotFile: a.cfg.SnapshotFile, MeshConfig: a.cfg.MeshConfig, StartupTaint: a.cfg.StartupTaint,
		Issues: policyIssues, Log: a.cfg.Log.With("part", "discovery"),
	})
	if err != nil {
		return err
	}
	a.source, a.publisher, a.sandboxes, a.cluster = source, source, source, source
	a.discover()
	a.run(source.Report)
	return nil
}

// policyIssues says of every policy what of it cannot be enforced as it is written.
func policyIssues(s *dataplane.Snapshot) []kube.Policy {
	list := make([]kube.Policy, 0, len(s.AuthorizationPolicies())+len(s.PeerAuthentications()))
	for i := range s.AuthorizationPolicies() {
		p := &s.AuthorizationPolicies()[i]
		list = append(list, kube.Policy{Kind: object.KindAuthorizationPolicy, Name: p.Name, Issues: authz.Issues(p)})
	}
	for i := range s.PeerAuthentications() {
		p := &s.PeerAuthentications()[i]
		list = append(list, kube.Policy{Kind: object.KindPeerAuthentication, Name: p.Name, Issues: authz.AuthenticationIssues(s, p)})
	}
	return list
}
