package kernel

import (
	"net/netip"

	"github.com/raceway-mesh/raceway/bpf"
)

// ToAddr is an address as the programs have it.
func ToAddr(a netip.Addr) bpf.RacewayAddr { return toAddr(a) }

// WithLayout stands in for an agent of another version, whose maps have another layout.
func (c Config) WithLayout(name string) Config {
	c.otherLayout = name
	return c
}
