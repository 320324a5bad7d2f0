// Package cluster starts a real Kubernetes on one machine, for tests: API server, etcd,
// controller manager and scheduler, and nodes with a kubelet, containerd and kube-proxy each.
//
//	┌──────────────────────────────────────────────────────────────────────────┐
//	│ network namespace raceway-cluster-control                                │
//	│   etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl │
//	│                                                                          │
//	│   bridge br0: 172.30.0.1/24, fd00:172:30::1/64                           │
//	│     │ node1                                │ node2   captures listen here│
//	└─────┼──────────────────────────────────────┼─────────────────────────────┘
//	┌─────┴─────────────────────────┐      ┌─────┴─────────────────────────┐
//	│ eth0 172.30.0.11              │      │ eth0 172.30.0.12              │
//	│      fd00:172:30::b           │      │      fd00:172:30::c           │
//	│ containerd, kubelet,          │      │ containerd, kubelet,          │
//	│ kube-proxy                    │      │ kube-proxy                    │
//	│ cni0 10.244.1.1/24            │      │ cni0 10.244.2.1/24            │
//	│      fd00:10:244:1::1/64      │      │      fd00:10:244:2::1/64      │
//	│   │         │                 │      │   │         │                 │
//	│  pod       pod                │      │  pod       pod                │
//	└───────────────────────────────┘      └───────────────────────────────┘
//
// A node has namespaces of its own of every kind but users': its processes see a machine with
// its own root file system, /run, bpffs, cgroups and network. Its root is the machine's, with
// what is written kept in memory; what must outlive a reboot is on the node's disk, a
// directory (node.Disk). StopNode is pulling the plug, StartNode boots anew from the disk.
//
// There is no registry: images are tar files that LoadImage gives to every node, and pods say
// imagePullPolicy: Never (or IfNotPresent). CoreDNS runs as in any cluster.
//
// Everything of a cluster has one name, raceway-cluster: a directory in /var/tmp, the prefix
// of its network namespaces, and a cgroup in each hierarchy that holds all its processes.
// There is one cluster of a name at a time; Start waits for the other to end. The variable
// RACEWAY_CLUSTER gives another name. Processes die with the
// one that started them; what else a killed test leaves is removed by the next Start, or by
// `go run ./e2e/cluster/cmd/clusterclean`.
package cluster
