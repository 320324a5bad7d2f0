package perf

import (
	"errors"
	"slices"

	"github.com/raceway-mesh/raceway/perf/yardstick"
)

// Scenario is a path between two pods.
type Scenario struct {
	Name      string
	Title     string // for people, at most two words on a line
	Mesh      bool
	SameNode  bool
	Kernel    bool // of a mesh on one node: by the kernel alone
	Yardstick bool // a pair of relays that is none of ours
	Rules     bool // of many policies, of which the last one allows
	UDP       bool // it is measured with UDP
	OnlyUDP   bool // and with nothing else
	// PassThrough has the client alone in the mesh: its traffic is captured, and leaves plain.
	PassThrough bool

	udp bool // a lab of it for UDP
}

func (s Scenario) name() string { return s.Name }

// proxied is false where there is no proxy to measure.
func (s Scenario) proxied() bool { return s.Mesh || s.Yardstick }

// crossing is the mesh at its plainest: what has nothing to do with the path is measured there.
func (s Scenario) crossing() bool { return s.Name == "hbone-cross" }

// Scenarios lists them all, each meshed one after those that it compares with.
func Scenarios() []Scenario {
	return []Scenario{
		{Name: "plain-cross", Title: "no mesh, across nodes", UDP: true},
		{Name: "relay-plain", Title: "bare Go relays, plain", Yardstick: true},
		{Name: "relay-tls", Title: "bare Go relays, TLS", Yardstick: true},
		{Name: "relay-quic", Title: "bare Go relays, QUIC", Yardstick: true, UDP: true, OnlyUDP: true},
		{Name: "haproxy", Title: "HAProxy pair, TLS", Yardstick: true},
		{Name: "envoy", Title: "Envoy pair, HBONE", Yardstick: true},
		{Name: "hbone-cross", Title: "HBONE, across nodes", Mesh: true, UDP: true},
		{Name: "hbone-rules", Title: "HBONE, many policies", Mesh: true, Rules: true},
		{Name: "pass-through", Title: "pass-through, across nodes", Mesh: true, PassThrough: true},
		{Name: "plain-same", Title: "no mesh, same node", SameNode: true},
		{Name: "hbone-same", Title: "HBONE, same node", Mesh: true, SameNode: true},
		{Name: "kernel-same", Title: "kernel, same node", Mesh: true, SameNode: true, Kernel: true},
	}
}

// ScenarioNames are what Config.Scenarios may name.
func ScenarioNames() []string { return names(Scenarios()) }

// pair is the yardstick of a scenario; nil of one that is none.
func (c Config) pair(scenario string) (yardstick.Pair, error) {
	relay := append(slices.Clone(c.Worker), "relay")
	switch scenario {
	case "relay-plain":
		return yardstick.GoRelay{Program: relay}, nil
	case "relay-tls":
		return yardstick.GoRelay{Program: relay, TLS: true}, nil
	case "relay-quic":
		return yardstick.QUICRelay{Program: relay}, nil
	case "haproxy":
		return yardstick.FindHAProxy(c.HAProxy)
	case "envoy":
		return yardstick.FindEnvoy(c.Envoy)
	}
	return nil, nil
}

// installed are the scenarios that can run here. The log says which cannot, and why.
func (c Config) installed() []string {
	return slices.DeleteFunc(ScenarioNames(), func(name string) bool {
		_, err := c.pair(name)
		if err != nil {
			c.Log.Warn("a yardstick is left out", "scenario", name, "err", err)
		}
		return errors.Is(err, yardstick.ErrNotInstalled)
	})
}

// versions are those of the yardsticks that take part.
func (c Config) versions() (haproxy, envoy string) {
	for _, name := range c.Scenarios {
		pair, _ := c.pair(name) // Validate has looked
		switch p := pair.(type) {
		case yardstick.HAProxy:
			haproxy = p.Version()
		case yardstick.Envoy:
			envoy = p.Version()
		}
	}
	return haproxy, envoy
}
