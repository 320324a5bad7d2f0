package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// stateName is the plugin's state in its directory.
const stateName = "state.json"

// State is what the plugin knows when the agent is away. It holds a token: only root reads it.
type State struct {
	// API is where to ask; its zero value is nowhere.
	API API `json:"api"`
	// ConfDir is the directory of the network configuration as the host sees it: a plugin
	// that finds Raceway uninstalled takes itself out there.
	ConfDir string `json:"confDir"`
	// Files are the agent's own on this node, which the plugin then removes as well.
	Files []string `json:"files,omitempty"`
	// Exempt are the namespaces whose pods start when nobody knows whether they are to be
	// enrolled.
	Exempt []string `json:"exempt,omitempty"`
	// Cluster is the last Snapshot, as far as enrolment goes.
	Cluster Cluster `json:"cluster"`
}

// API is the API server and the account of the plugin, which may read namespaces and pods.
type API struct {
	Server string `json:"server,omitempty"` // https://host:port
	CA     string `json:"ca,omitempty"`     // PEM; the only roots
	Token  string `json:"token,omitempty"`
	// Expires is the token's exp; zero when it has none.
	Expires time.Time `json:"expires,omitzero"`
}

// Cluster is what decides on enrolment. Labels that do not are left out.
type Cluster struct {
	Released     bool                         `json:"released,omitempty"`
	EnrollLabels []string                     `json:"enrollLabels,omitempty"`
	Namespaces   map[string]map[string]string `json:"namespaces"`
	// Pods are those of this node with labels of their own, by UID: a name may be another
	// pod's by now.
	Pods map[string]map[string]string `json:"pods,omitempty"`
}

// ClusterOf returns what s says of all namespaces and of the pods of a node.
func ClusterOf(s *dataplane.Snapshot, node string) Cluster {
	c := Cluster{
		Released:     s.Released(),
		EnrollLabels: s.EnrollLabels(),
		Namespaces:   make(map[string]map[string]string, len(s.Namespaces())),
		Pods:         make(map[string]map[string]string),
	}
	for _, ns := range s.Namespaces() {
		c.Namespaces[ns.Name] = c.relevant(ns.Labels)
	}
	for _, w := range s.Workloads() {
		if labels := c.relevant(w.Labels); w.Node == node && len(labels) > 0 {
			c.Pods[w.UID] = labels
		}
	}
	return c
}

func (c *Cluster) relevant(labels map[string]string) map[string]string {
	kept := make(map[string]string)
	for _, key := range append([]string{dataplane.ModeLabel}, c.EnrollLabels...) {
		if value, ok := labels[key]; ok {
			kept[key] = value
		}
	}
	return kept
}

// Wants reports whether a pod is to be enrolled, and whether its namespace is known at all.
// A pod that is not known has no labels of its own: uid may be "".
func (c *Cluster) Wants(namespace, uid string) (wanted, known bool) {
	if c.Released {
		return false, true
	}
	labels, known := c.Namespaces[namespace]
	return known && dataplane.WantsEnrolment(c.Pods[uid], labels, c.EnrollLabels...), known
}

// WriteState replaces the state in dir, atomically, unless it is the same.
func WriteState(dir string, s State) error {
	text, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write the CNI plugin's state: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("create the directory of the CNI plugin's state: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create the directory of the CNI plugin's state: %w", err)
	}
	path := filepath.Join(dir, stateName)
	if was, err := os.ReadFile(path); err == nil && bytes.Equal(was, text) {
		if info, err := os.Stat(path); err == nil && info.Mode().Perm() == stateMode {
			return nil
		}
	}
	if err := put(path, text, stateMode, nil); err != nil {
		return fmt.Errorf("write the CNI plugin's state: %w", err)
	}
	return nil
}

// stateMode keeps the token from everyone but root.
const stateMode fs.FileMode = 0o600

// ReadState reads the state in dir and leaves it as it is, whatever that may be.
func ReadState(dir string) (State, error) {
	path := filepath.Join(dir, stateName)
	text, err := os.ReadFile(path)
	return parseState(path, text, err)
}

// ReadStateIn is ReadState of a directory in root, which no link leads out of.
func ReadStateIn(root *os.Root, dir string) (State, error) {
	path := filepath.Join(dir, stateName)
	text, err := root.ReadFile(path)
	return parseState(path, text, err)
}

func parseState(path string, text []byte, err error) (State, error) {
	if err != nil {
		return State{}, fmt.Errorf("read the CNI plugin's state: %w", err)
	}
	var s State
	if err := json.Unmarshal(text, &s); err != nil {
		return State{}, fmt.Errorf("read the CNI plugin's state %s: %w", path, err)
	}
	return s, nil
}
