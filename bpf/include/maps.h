/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Everything that outlives one version of the programs: the pinned maps and their
 * layouts. The agent hashes this file into the name of the directory that the maps are
 * pinned in, so any edit here makes a restarted agent replace the old maps instead of
 * adopting them. Go types are generated from these (bpf2go -type).
 */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

/* An IPv6 address, or an IPv4 one as ::ffff:a.b.c.d; network byte order. */
struct addr {
	__u32 word[4];
};

enum {
	POD_ADDRS = 8,
	MAX_PODS = 4096,
	MAX_ESTABLISHED = 262144,
	MAX_PROBES = 65536,
};

enum pod_flag {
	POD_OUTBOUND = 1, /* connect() is redirected to the outbound listener */
	POD_INBOUND = 2,  /* plaintext from outside goes to the inbound listener */
};

struct pod {
	enum pod_flag flags;
	__u32 addr_count;
	struct addr addrs[POD_ADDRS];
};

/* Enrolled pods by the cookie of their network namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

enum listener {
	LISTENER_NONE = 0,
	LISTENER_OUTBOUND = 1,
	LISTENER_INBOUND = 2,
	LISTENER_TUNNEL = 3,
};

struct listener_key {
	__u64 netns;
	enum listener kind;
	__u32 zero;
};

/* The agent's listeners. An entry goes when its socket is closed, so a dead agent has none. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_PODS * 3);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

/*
 * Sockets of the agent. Only who may write BPF maps can put a socket here, which no mark,
 * port or user id can promise: an application with CAP_NET_RAW sets any SO_MARK it likes.
 * BPF_F_CLONE hands the entry of a listener on to the connections it accepts.
 */
struct owner {
	enum listener role; /* what it accepts; LISTENER_NONE for what it dials */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct owner);
} own SEC(".maps");

struct tuple {
	__u64 netns;
	struct addr local;
	struct addr remote;
	__u16 local_port; /* host byte order, as is remote_port */
	__u16 remote_port;
	__u32 zero;
};

enum stage {
	STAGE_COMPLETE = 1, /* may send payload */
	STAGE_OPENING = 2,  /* may send its SYN as well: it was in SYN_SENT */
};

/*
 * Connections that are older than their pod's enrolment and go on in clear. The one map
 * whose contents a new layout cannot make anew: once the pod is captured, what the kernel
 * lists may be forged. The agent copies them over while key and value keep their sizes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_ESTABLISHED);
	__type(key, struct tuple);
	__type(value, enum stage);
} established SEC(".maps");

/* The network namespace of each address of an enrolled pod. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * POD_ADDRS);
	__type(key, struct addr);
	__type(value, __u64);
} homes SEC(".maps");

/*
 * Where the node's kubelet stands: in which namespace and cgroup, and as which process. Not
 * at which address: that is the node's, and every pod with hostNetwork has it.
 */
struct place {
	__u64 netns; /* 0: the kubelet is not known */
	__u64 cgroup;
	__u32 tgid; /* 0: every process of the cgroup */
	__u32 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct place);
} kubelet SEC(".maps");

/* A socket that the kubelet connects: zero, and its key in `probes` once it is there. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct tuple);
} probing SEC(".maps");

/*
 * The kubelet's live connections to enrolled pods, as the pods see them, and when each was
 * made (CLOCK_MONOTONIC, ns). A hash and not an LRU, which would forget live ones.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PROBES);
	__type(key, struct tuple);
	__type(value, __u64);
} probes SEC(".maps");

/*
 * One counter for every way out of a program. The agent splits the name at its first
 * underscore into the hook and the reason.
 */
enum counter {
	CONNECT_NOT_TCP,
	CONNECT_NOT_ENROLLED,
	CONNECT_KUBELET,
	CONNECT_NOT_CAPTURING,
	CONNECT_OWN,
	CONNECT_LOOPBACK,
	CONNECT_LINK_LOCAL,
	CONNECT_SELF,
	CONNECT_REDIRECTED,
	CONNECT_REFUSED_NO_SOCKET,
	CONNECT_REFUSED_NO_AGENT,
	CONNECT_REFUSED_MARK,
	CONNECT_REFUSED_UNBIND,

	STEER_NOT_TCP,
	STEER_DROPPED_UNKNOWN_POD,
	STEER_LEFT,
	STEER_PROBE,
	STEER_OUTBOUND,
	STEER_INBOUND,
	STEER_TUNNEL,
	STEER_DROPPED_NO_LISTENER,
	STEER_DROPPED_ASSIGN,

	INGRESS_NOT_TCP,
	INGRESS_DROPPED_MALFORMED,
	INGRESS_DROPPED_FRAGMENT,
	INGRESS_DROPPED_UNKNOWN_POD,
	INGRESS_LEFT,
	INGRESS_CONNECTED,
	INGRESS_PROBE,
	INGRESS_OUTBOUND,
	INGRESS_INBOUND,
	INGRESS_TUNNEL,
	INGRESS_DROPPED_NO_LISTENER,
	INGRESS_DROPPED_ASSIGN,

	GUARD_PASSED_ARP,
	GUARD_PASSED_NOT_TCP,
	GUARD_PASSED_NO_DATA,
	GUARD_PASSED_OWN,
	GUARD_PASSED_PROBE,
	GUARD_PASSED_ENDED,
	GUARD_PASSED_ESTABLISHED,
	GUARD_DROPPED_UNKNOWN_POD,
	GUARD_DROPPED_VLAN,
	GUARD_DROPPED_ETHERTYPE,
	GUARD_DROPPED_MALFORMED,
	GUARD_DROPPED_SOURCE_ROUTE,
	GUARD_DROPPED_FOREIGN_SOURCE,
	GUARD_DROPPED_PROTOCOL,
	GUARD_DROPPED_FRAGMENT,
	GUARD_DROPPED_CONNECT,
	GUARD_DROPPED_PAYLOAD,

	PROBE_OPENED,
	PROBE_CLOSED,
	PROBE_ELSEWHERE,
	PROBE_REFUSED_FLAGS,
	PROBE_REFUSED_FULL,

	COUNTERS,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, enum counter);
	__type(value, __u64);
} counters SEC(".maps");

static __always_inline void count(enum counter c)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &c);

	if (value)
		(*value)++; /* per CPU; a lost update under preemption is a statistic's error */
}
