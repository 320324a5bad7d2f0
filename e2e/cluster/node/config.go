// Package node is a Kubernetes node in a box: what the first process of its namespaces does.
// Package cluster makes the box, starts this in it and ends it.
package node

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// Config is what a node needs to know. It is written by package cluster.
type Config struct {
	Name     string         `json:"name"`
	Addrs    []netip.Addr   `json:"addrs"`
	PodCIDRs []netip.Prefix `json:"podCIDRs"`

	// Dir is the node's directory: its disk, and what its root is mounted from.
	Dir string `json:"dir"`
	// Parts is the directory of package parts.
	Parts string `json:"parts"`
	// PauseImage is loaded before the kubelet starts.
	PauseImage string `json:"pauseImage"` // the tar's path
	PauseRef   string `json:"pauseRef"`

	// Cgroups are the node's, one in each hierarchy, and where they are to be mounted.
	Cgroups []Cgroup `json:"cgroups"`

	APIServer  string       `json:"apiServer"`
	AwaitAPI   bool         `json:"awaitAPI"` // before the kubelet starts: at first boot it would only back off
	ClusterDNS []netip.Addr `json:"clusterDNS"`
	PodRanges  []string     `json:"podRanges"` // of the whole cluster
	ProxyMode  string       `json:"proxyMode"` // nftables, iptables, or none
	CNI        string       `json:"cni"`       // bridge, or none
	Taints     []string     `json:"taints"`    // key=value:effect, at registration
}

// Cgroup is the node's in one hierarchy.
type Cgroup struct {
	Dir         string `json:"dir"`         // as the machine sees it
	Mount       string `json:"mount"`       // below /sys/fs/cgroup, "" for the directory itself
	Controllers string `json:"controllers"` // mount option of version 1; "" is version 2
}

// Disk lists what survives when the node is switched off. All else of its file system is the
// machine's own, and what is written there is gone.
func Disk() []string {
	return []string{
		"/etc/cni", "/etc/kubernetes", "/opt/cni",
		"/var/lib/cni", "/var/lib/containerd", "/var/lib/kubelet", "/var/lib/raceway", "/var/log",
	}
}

// OnDisk is where the machine finds a path of the node's disk.
func (c Config) OnDisk(path string) string { return filepath.Join(c.Dir, "disk", path) }

// File is where the configuration is, for Boot.
func (c Config) File() string { return filepath.Join(c.Dir, "node.json") }

// Write writes File.
func (c Config) Write() error {
	content, err := json.Marshal(c)
	if err == nil {
		err = os.WriteFile(c.File(), content, 0o600)
	}
	if err != nil {
		return fmt.Errorf("write the node's configuration: %w", err)
	}
	return nil
}

func read(file string) (Config, error) {
	var c Config
	content, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(content, &c)
	}
	if err != nil {
		return c, fmt.Errorf("read the node's configuration: %w", err)
	}
	return c, nil
}
