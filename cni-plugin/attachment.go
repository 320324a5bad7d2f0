package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// attachment is what the runtime asks about.
type attachment struct {
	entry   conf.Entry
	prev    types.Result // of the plugins before this one; nil when there is none
	version string       // of the result
	sandbox discovery.Sandbox
	isPod   bool // what is no pod has no labels, and is none of Raceway's
}

func readAttachment(args *skel.CmdArgs) (*attachment, error) {
	var stdin struct {
		types.PluginConf
		conf.Entry
	}
	if err := json.Unmarshal(args.StdinData, &stdin); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read the configuration: "+err.Error(), "")
	}
	decoder := version.ConfigDecoder{}
	v, err := decoder.Decode(args.StdinData) // with its default
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	stdin.CNIVersion = v
	if err := version.ParsePrevResult(&stdin.PluginConf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read the result of the plugin before: "+err.Error(), "")
	}
	a := &attachment{entry: stdin.Entry, prev: stdin.PrevResult, version: v}
	if a.sandbox, a.isPod, err = readArgs(args); err != nil {
		return nil, err
	}
	if a.prev != nil {
		if a.sandbox.Addrs, err = addresses(a.prev); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// readArgs reads what runtimes of Kubernetes put into CNI_ARGS. K8S_POD_INFRA_CONTAINER_ID is
// left: the network namespace says the same and is what is used.
func readArgs(args *skel.CmdArgs) (s discovery.Sandbox, isPod bool, err error) {
	given := make(map[string]string)
	for _, pair := range strings.Split(args.Args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		given[strings.TrimSpace(key)] = strings.TrimSpace(value)
	}
	s = discovery.Sandbox{
		Pod:   dataplane.Name{Namespace: given["K8S_POD_NAMESPACE"], Name: given["K8S_POD_NAME"]},
		UID:   given["K8S_POD_UID"],
		NetNS: args.Netns,
	}
	if (s.Pod.Namespace == "") != (s.Pod.Name == "") {
		return s, false, types.NewError(types.ErrInvalidEnvironmentVariables,
			fmt.Sprintf("CNI_ARGS %q names half a pod: K8S_POD_NAMESPACE and K8S_POD_NAME belong together", args.Args), "")
	}
	return s, s.Pod.Name != "", nil
}

// addresses are those of the result that are inside the sandbox.
func addresses(prev types.Result) ([]netip.Addr, error) {
	result, err := types100.NewResultFromResult(prev)
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read the result of the plugin before: "+err.Error(), "")
	}
	var found []netip.Addr
	for _, ip := range result.IPs {
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(result.Interfaces) && result.Interfaces[*i].Sandbox == "" {
			continue // the host's end
		}
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			found = append(found, a.Unmap())
		}
	}
	return found, nil
}
