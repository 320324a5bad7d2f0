package kernel

import (
	"log/slog"
	"net/netip"
	"testing"

	"github.com/raceway-mesh/raceway/bpf"
)

func TestConfigValidation(t *testing.T) {
	good := Config{Dir: "/sys/fs/bpf/raceway/node-1", Log: slog.New(slog.DiscardHandler)}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	if got, want := good.withDefaults().StateDir, "/run/raceway/node-1"; got != want {
		t.Errorf("state directory %s, want %s", got, want)
	}
	for name, change := range map[string]func(*Config){
		"relative directory": func(c *Config) { c.Dir = "raceway" },
		"no directory":       func(c *Config) { c.Dir = "" },
		"inbound mode":       func(c *Config) { c.Inbound = "nftables" },
		"tc mode":            func(c *Config) { c.TC = "qdisc" },
		"no logger":          func(c *Config) { c.Log = nil },
	} {
		c := good
		change(&c)
		if c.Validate() == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestPodConfigValidation(t *testing.T) {
	good := PodConfig{UID: "u", NetNS: "/run/netns/x", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	if err := good.validate(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*PodConfig){
		"no UID":             func(c *PodConfig) { c.UID = "" },
		"no namespace":       func(c *PodConfig) { c.NetNS = "" },
		"no address":         func(c *PodConfig) { c.Addrs = nil },
		"too many addresses": func(c *PodConfig) { c.Addrs = make([]netip.Addr, maxAddrs+1) },
	} {
		c := good
		change(&c)
		if c.validate() == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestAddressesSurviveTheTripToTheKernel(t *testing.T) {
	for _, s := range []string{"10.1.2.3", "::1", "fd00::abcd", "0.0.0.0", "::", "255.255.255.255"} {
		want := netip.MustParseAddr(s)
		if got := fromAddr(toAddr(want)); got != want {
			t.Errorf("%v became %v", want, got)
		}
	}
	mapped := netip.MustParseAddr("::ffff:10.1.2.3")
	if toAddr(mapped) != toAddr(mapped.Unmap()) {
		t.Error("an address and its v4-mapped form differ")
	}
}

func TestConnectionRecordsMustBeWhole(t *testing.T) {
	if got, err := records[bpf.RacewayConnection]("iter/tcp", make([]byte, 112)); err != nil || len(got) != 2 {
		t.Errorf("%d records, %v; want 2", len(got), err)
	}
	if _, err := records[bpf.RacewayConnection]("iter/tcp", make([]byte, 111)); err == nil {
		t.Error("a part of a record was accepted")
	}
}
