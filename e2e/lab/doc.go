// Package lab is a cluster on one machine: nodes and pods are network namespaces, the
// cluster's state is a directory of ordinary Kubernetes YAML, and the processes are the real
// raceway-agent and raceway-ca. The demo, the end-to-end tests and the benchmarks all run on it.
//
//	  pod  web              pod  client                       pod  db
//	┌──────────────┐      ┌──────────────┐                  ┌──────────────┐
//	│ eth0         │      │ eth0         │                  │ eth0         │
//	│ 10.244.1.2/32│      │ 10.244.1.3/32│                  │ 10.244.2.2/32│
//	└──────┬───────┘      └──────┬───────┘                  └──────┬───────┘
//	       │ default via 10.244.1.1                                │ via 10.244.2.1
//	┌──────┴─────────────────────┴───────┐                  ┌──────┴───────┐
//	│ pod1                  pod2         │                  │ pod1         │
//	│ node1    podCIDR 10.244.1.0/24     │                  │ node2        │
//	│ eth0 172.30.1.2   (raceway-agent)  │                  │ 172.30.2.2   │
//	└──────┬─────────────────────────────┘                  └──────┬───────┘
//	       │                                                       │
//	┌──────┴───────────────────────────────────────────────────────┴───────┐
//	│ node1 172.30.1.1          fabric (a router)         172.30.2.1 node2 │
//	│ control 172.30.0.1        captures listen here                       │
//	└──────┬───────────────────────────────────────────────────────────────┘
//	┌──────┴───────────┐
//	│ eth0 172.30.0.2  │
//	│ control          │  raceway-ca; to the mesh a host outside the cluster
//	└──────────────────┘
//
// Every box is a network namespace and every line a veth pair. The layout of a pod is that of
// the usual CNI plugins: a single address on eth0, a default route to an address on the host's
// end, one host route per pod on the node. The IPv6 plan is the same with
// fd00:10:244:<node>::/64 for pods and fd00:172:30:<node>::/64 for links.
//
// Nothing is changed in the namespace that the lab is started from: no link, address, route or
// sysctl. Outside its namespaces the lab has one directory (Lab.Dir) that holds everything of
// it, a bpffs of its own among it, so that Close can end it all and Leftovers can prove it.
//
// There is no kube-proxy: a service's cluster IP works only from a pod whose outbound traffic
// is captured. There is no DNS either.
package lab
