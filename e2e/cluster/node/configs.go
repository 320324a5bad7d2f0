package node

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
)

// containerdConfig is for containerd 1.6 and later. Only a privileged machine can lower an
// oom_score_adj; a container that asks for it gets what is possible.
func (c Config) containerdConfig() string {
	return fmt.Sprintf(`version = 2
[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = '%s'
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]
      BinaryName = '%s'
      SystemdCgroup = false
`, c.PauseRef, filepath.Join(PartsDir, "debian/usr/sbin/runc"))
}

func (c Config) kubeletConfig() string {
	var dns []string
	for _, a := range c.ClusterDNS {
		dns = append(dns, a.String())
	}
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%s
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: false}
  x509: {clientCAFile: %s}
authorization: {mode: AlwaysAllow}
clusterDomain: cluster.local
clusterDNS: %s
resolvConf: ""
staticPodPath: %s
evictionHard: {memory.available: "100Mi", nodefs.available: "1%%", nodefs.inodesFree: "1%%", imagefs.available: "1%%"}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 4s
shutdownGracePeriod: 0s
registerWithTaints: %s
`, containerdSocket, clientCA, inJSON(dns), manifests, inJSON(c.taints()))
}

type taint struct {
	Key    string `json:"key"`
	Value  string `json:"value,omitempty"`
	Effect string `json:"effect"`
}

func (c Config) taints() []taint {
	taints := []taint{}
	for _, t := range c.Taints {
		what, effect, _ := strings.Cut(t, ":")
		key, value, _ := strings.Cut(what, "=")
		taints = append(taints, taint{key, value, effect})
	}
	return taints
}

func (c Config) kubeletArgs() []string {
	addrs := make([]string, 0, len(c.Addrs))
	for _, a := range c.Addrs {
		addrs = append(addrs, a.String())
	}
	return []string{
		"--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=" + kubeletKubeconf,
		"--hostname-override=" + c.Name, "--node-ip=" + strings.Join(addrs, ","), "-v=2",
	}
}

// proxyConfig leaves the machine's conntrack limits alone: a namespace cannot set them.
func (c Config) proxyConfig() string {
	return fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
clusterCIDR: %s
oomScoreAdj: 0
clientConnection: {kubeconfig: %s}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, c.ProxyMode, strings.Join(c.PodRanges, ","), proxyKubeconf)
}

// bridgeConfig is the plainest CNI there is: every node has a bridge, and the pods' ranges
// are routed between the nodes.
func (c Config) bridgeConfig() string {
	type subnet struct {
		Subnet netip.Prefix `json:"subnet"`
	}
	type route struct {
		Dst string `json:"dst"`
	}
	var (
		ranges [][]subnet
		routes []route
	)
	for _, p := range c.PodCIDRs {
		ranges = append(ranges, []subnet{{p}})
		if p.Addr().Is4() {
			routes = append(routes, route{"0.0.0.0/0"})
		} else {
			routes = append(routes, route{"::/0"})
		}
	}
	return inJSON(map[string]any{
		"cniVersion": "1.0.0", "name": "bridge",
		"plugins": []any{
			map[string]any{
				"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": false,
				"ipam": map[string]any{"type": "host-local", "ranges": ranges, "routes": routes},
			},
			map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
		},
	}) + "\n"
}

// inJSON cannot fail for what is made here; YAML reads it too.
func inJSON(v any) string {
	content, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("a configuration that is no JSON: %v", err))
	}
	return string(content)
}
