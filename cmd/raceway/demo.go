package main

const (
	demoShort = "Show it all on this machine: two nodes, real agents, real traffic"
	demoLong  = `Show what Raceway does, step by step, on this machine: two nodes and a few pods out of network
namespaces, the real agents and a real CA, and real traffic with packet captures.

It needs root and Linux 5.15 or newer with BTF and cgroup v2, takes about a minute, and removes
everything in the end, also when it is interrupted. Where MariaDB is installed, it plays a part.`
)
