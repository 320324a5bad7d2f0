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
	MAX_ALLOWED = 65536,
	MAX_ADMITTED = 262144,
	MAX_LOCAL = 8,
	MAX_PEERS = 262144,
	MAX_FLOWS = 262144,
	MAX_CLEAR_FLOWS = 65536,
	MAX_FRAGMENTED = 16384,
	CLEAR_PORTS = 8,
	EVENTS_SIZE = 1 << 20, /* bytes */
};

enum pod_flag {
	POD_OUTBOUND = 1, /* connect() is redirected to the outbound listener */
	POD_INBOUND = 2,  /* plaintext from outside goes to the inbound listener */
	POD_UDP = 4,      /* UDP to peers goes to the agent: see datagram.h */
	POD_STRICT = 8,   /* and in clear peers may send none */
	POD_REQUIRE = 16, /* and so does UDP to others, which it refuses */
};

/* Host byte order, both ends included. */
struct ports {
	__u16 first;
	__u16 last;
};

/* Destination ports that UDP leaves alone. */
struct clear_ports {
	__u32 count;
	struct ports ports[CLEAR_PORTS];
};

struct pod {
	enum pod_flag flags;
	__u32 addr_count;
	struct addr addrs[POD_ADDRS];
	struct clear_ports clear;
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
	/* for UDP */
	LISTENER_DATAGRAMS = 4, /* what the pod sends to peers */
	LISTENER_QUIC = 5,      /* what peers send to the tunnel's port */
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

/* What a pod connects to. */
struct destination {
	__u64 netns; /* the pod's */
	struct addr addr;
	__u16 port; /* host byte order */
	__u16 zero[3];
};

/* A pod of this node that takes connections of another by the kernel: see direct.h. */
struct endpoint {
	__u64 netns;
	struct addr addr;
	__u16 port; /* host byte order */
	__u16 zero[3];
};

/*
 * The agent's verdict on a destination: of `total` equal endpoints the first `local` ones may
 * be reached by the kernel, others are for the agent.
 */
struct allowance {
	__u64 generation; /* it holds while this is the one in force */
	__u32 total;
	__u32 local;
	struct endpoint endpoints[MAX_LOCAL];
};

/* What is not in it, or no longer, goes through the agent: nothing rests on it staying there. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_ALLOWED);
	__type(key, struct destination);
	__type(value, struct allowance);
} allowed SEC(".maps");

/* Which allowances are in force: one write revokes all. 0: none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} generation SEC(".maps");

enum admission_stage {
	ADMISSION_OPENING = 1, /* the SYN may go */
	ADMISSION_ARRIVED = 2, /* it was seen in the destination's namespace: data may go */
	ADMISSION_ENDED = 3,   /* the client has no socket any more, and its kernel may say so */
};

struct admission {
	enum admission_stage stage;
	__u32 zero;
	__u64 since; /* CLOCK_MONOTONIC, ns: of the SYN, or of the end */
};

/*
 * Live connections between pods of this node that go by the kernel, as the destination sees
 * them. They alone say what guards and steer let by. No LRU, which would forget live ones.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_ADMITTED);
	__type(key, struct tuple);
	__type(value, struct admission);
} admitted SEC(".maps");

enum direct_stage {
	DIRECT_CHOSEN = 1,    /* connect() chose the endpoint; there is no source port yet */
	DIRECT_ADMITTED = 2,  /* in `admitted` */
	DIRECT_ELSEWHERE = 3, /* through the agent after all */
};

/* The client's socket of such a connection. */
struct direct {
	struct tuple key; /* in `admitted`; until then without the remote end */
	struct destination asked;
	__u64 since; /* CLOCK_MONOTONIC, ns */
	enum direct_stage stage;
	__u32 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct direct);
} clients SEC(".maps");

enum event_kind {
	EVENT_OPENED = 1,
	EVENT_CLOSED = 2,
	EVENT_FAILED = 3,     /* it was refused, or nobody answered */
	EVENT_UNANSWERED = 4, /* the SYN did not arrive: through the agent */
	/* not of `events`: listed */
	EVENT_OPENING = 5,
	EVENT_LIVE = 6,
};

/* What becomes of them, for the agent. */
struct event {
	struct direct what;
	__u64 now;      /* CLOCK_MONOTONIC, ns */
	__u64 sent;     /* payload that the destination acknowledged */
	__u64 received; /* payload that came back */
	__u32 srtt;     /* microseconds */
	__u32 retransmits;
	enum event_kind kind;
	__u32 error; /* errno of the client's socket, as far as it has one */
	__u8 clean;  /* both ends finished */
	__u8 arrived; /* the destination saw the SYN */
	__u8 zero[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_SIZE);
} events SEC(".maps");

/*
 * UDP. A peer is who speaks the tunnel: a workload by its address, with port 0, or a service by
 * its address and port. All pods have the same ones.
 */
struct peer {
	struct addr addr;
	__u16 port; /* host byte order; 0: all */
	__u16 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PEERS);
	__type(key, struct peer);
	__type(value, struct clear_ports); /* those of the peer */
} peers SEC(".maps");

/* The agent's UDP sockets in a pod, as `listeners` for TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, struct listener_key);
	__type(value, __u64);
} receivers SEC(".maps");

/* What the connection IDs begin with that a socket of LISTENER_QUIC gives out. */
struct quic_key {
	__u64 netns;
	__u8 mark[2];
	__u8 zero[6];
};

/*
 * Those sockets by their marks: of the agent that has the node, and of those before it whose
 * connections live. An entry goes when its socket is closed.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, struct quic_key);
	__type(value, __u64);
} quic_marks SEC(".maps");

/* Flows that came to a pod by the tunnel, and since when their agent has the pod's UDP (CLOCK_MONOTONIC, ns). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct tuple);
	__type(value, __u64);
} flows SEC(".maps");

/* Sockets that are older than the capture of UDP in their pod, and when that was. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} older_sockets SEC(".maps");

/*
 * Flows with peers in clear, begun by a socket of either end that is older than the capture, or
 * on a port that is left alone; and when last (CLOCK_MONOTONIC, ns). What it forgets is
 * captured, which works as well.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_CLEAR_FLOWS);
	__type(key, struct tuple);
	__type(value, __u64);
} clear_flows SEC(".maps");

/* A datagram in fragments, of which only the first has the ports. */
struct fragmented {
	__u64 netns;
	struct addr src;
	struct addr dst;
	__u32 id;
	__u32 hook; /* which one has judged it */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FRAGMENTED);
	__type(key, struct fragmented);
	__type(value, __u32); /* as the hook means it */
} fragments SEC(".maps");

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
	CONNECT_DIRECT,
	CONNECT_REDIRECTED,
	CONNECT_REFUSED_NO_SOCKET,
	CONNECT_REFUSED_NO_AGENT,
	CONNECT_REFUSED_MARK,
	CONNECT_REFUSED_UNBIND,

	STEER_NOT_TCP,
	STEER_DROPPED_UNKNOWN_POD,
	STEER_LEFT,
	STEER_PROBE,
	STEER_DIRECT,
	STEER_OUTBOUND,
	STEER_INBOUND,
	STEER_TUNNEL,
	STEER_DATAGRAM,
	STEER_QUIC,
	STEER_DROPPED_NO_LISTENER,
	STEER_DROPPED_ASSIGN,

	INGRESS_NOT_TCP,
	INGRESS_DROPPED_MALFORMED,
	INGRESS_DROPPED_FRAGMENT,
	INGRESS_DROPPED_UNKNOWN_POD,
	INGRESS_LEFT,
	INGRESS_CONNECTED,
	INGRESS_PROBE,
	INGRESS_DIRECT,
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
	GUARD_PASSED_DIRECT,
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
	GUARD_DROPPED_DATAGRAM,
	DIVERT_OFF,
	DIVERT_NOT_UDP,
	DIVERT_OWN,
	DIVERT_ELSEWHERE,
	DIVERT_CLEAR_PORT,
	DIVERT_CLEAR_OLDER,
	DIVERT_CLEAR_ANSWER,
	DIVERT_TUNNEL,
	DIVERT_DROPPED_MALFORMED,
	DIVERT_DROPPED_FRAME,
	RECEIVE_OFF,
	RECEIVE_NOT_UDP,
	RECEIVE_TUNNEL,
	RECEIVE_CONNECTION,
	RECEIVE_ELSEWHERE,
	RECEIVE_CLEAR,
	RECEIVE_DROPPED_CLEAR,
	RECEIVE_DROPPED_MIXED,
	RECEIVE_DROPPED_MALFORMED,

	PROBE_OPENED,
	PROBE_CLOSED,
	PROBE_ELSEWHERE,
	PROBE_REFUSED_FLAGS,
	PROBE_REFUSED_FULL,

	DIRECT_OPENING,
	DIRECT_OPENED,
	DIRECT_CLOSED,
	DIRECT_FAILED,
	DIRECT_PROXIED_REVOKED,
	DIRECT_PROXIED_REWRITTEN,
	DIRECT_PROXIED_SOURCE,
	DIRECT_PROXIED_FASTOPEN,
	DIRECT_PROXIED_FLAGS,
	DIRECT_PROXIED_FULL,
	DIRECT_PROXIED_UNANSWERED,
	DIRECT_DROPPED_MARK,
	DIRECT_DROPPED_TRANSLATED,
	DIRECT_DROPPED_EVENT,

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
