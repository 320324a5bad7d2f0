// Command raceway-cni is a chained CNI plugin: it lets the start of an enrolled pod go on only
// when the agent of the node has captured its traffic. It changes nothing itself.
//
// What it decides when the agent is away is in docs/cni.md.
package main

import (
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"
)

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    add,
		Check:  check,
		Del:    del,
		GC:     func(*skel.CmdArgs) error { return nil }, // it allocates nothing that could be left over
		Status: status,
	}, version.All, "raceway-cni holds up a pod of Raceway's mesh until its traffic is captured")
}

// status succeeds also while the agent is away: a runtime that gets an error here reports the
// node's network as not ready, and then not even the agent's own pod would be started. The
// plugin can do its part: pods outside the mesh start, and those of it are held up one by one.
func status(*skel.CmdArgs) error { return nil }
