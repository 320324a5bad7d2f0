// Package bpf holds Raceway's BPF programs: their C sources, the object compiled from
// them, and the Go types of what they share with the agent. Package dataplane/kernel
// loads them; nothing else does.
package bpf

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
)

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package bpf -target bpfel -type addr -type pod -type pod_flag -type listener -type listener_key -type owner -type place -type tuple -type stage -type connection -type destination -type endpoint -type allowance -type admission_stage -type admission -type direct_stage -type direct -type event_kind -type event -type ports -type clear_ports -type peer -type quic_key Raceway raceway.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -Wno-unused-function -Wno-unknown-attributes -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

//go:embed include/maps.h
var layout []byte

// NetNSPlaceholder is the immediate in the per-pod programs that stands for the cookie of
// the pod's network namespace (NETNS_PLACEHOLDER in include/config.h).
const NetNSPlaceholder = 0x7261636577617900

// Layout names the layout of the pinned maps. Maps of another layout cannot be adopted.
func Layout() string {
	sum := sha256.Sum256(layout)
	return hex.EncodeToString(sum[:4])
}
