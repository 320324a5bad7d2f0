/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * UDP of an enrolled pod, packet by packet; nothing is done to its sockets:
 *
 *   app   sendmsg(db:53)    divert, at the egress of eth0: db is in `peers`: off to lo
 *         lo                ip rule, steer: to the agent's socket, destination as it was
 *   agent answer            from db:53, as a raw packet to the pod's own address: by lo
 *
 *   agent from the client   likewise; the flow is in `flows`
 *   app   answer            divert: in `flows`: off to lo, to the agent
 *
 * Capture is by destination, so that one socket may talk to peers and to others at once. In
 * clear stay, of what goes to peers: sockets older than the capture, ports that are left alone,
 * and answers to what came in clear. Whatever of the rest gets to the guard is dropped there.
 * Where POD_REQUIRE is set everybody is a peer to that, for the agent to refuse.
 */
#pragma once
#include <linux/udp.h>
#include "config.h"
#include "kernel.h"
#include "packet.h"

enum {
	DHCP_SERVER = 67, /* RFC 2131 section 4.1 */
	DHCP_CLIENT = 68,
	CLEAR_NS = 120 * 1000000000LL, /* what was said in clear is answered in clear for that long (RFC 4787 REQ-5) */
};

/* What is to become of a datagram that leaves a pod. */
enum way {
	WAY_OWN,          /* the agent's */
	WAY_ELSEWHERE,    /* to nobody that speaks the tunnel */
	WAY_CLEAR_PORT,   /* to a port that is left alone */
	WAY_CLEAR_OLDER,  /* of a socket that is older than the capture */
	WAY_CLEAR_ANSWER, /* to a peer that spoke in clear */
	WAY_TUNNEL,
	WAY_MALFORMED,
};

/* Hooks that judge fragments, each for itself. */
enum judge {
	JUDGE_DIVERT = 1,
	JUDGE_GUARD = 2,
	JUDGE_RECEIVE = 3,
};

static __always_inline bool in_ports(const struct clear_ports *c, __u16 port)
{
#pragma unroll
	for (int i = 0; i < CLEAR_PORTS; i++) {
		if (i < c->count && c->ports[i].first <= port && port <= c->ports[i].last)
			return true;
	}
	return false;
}

static __always_inline struct clear_ports *find_peer(const struct addr *addr, __u16 port)
{
	struct peer key = { .addr = *addr, .port = port };
	struct clear_ports *peer = bpf_map_lookup_elem(&peers, &key);

	if (peer || !port)
		return peer;
	key.port = 0;
	return bpf_map_lookup_elem(&peers, &key);
}

static __always_inline bool spoke_in_clear(const struct tuple *t)
{
	__u64 *last = bpf_map_lookup_elem(&clear_flows, t);

	return last && bpf_ktime_get_ns() - *last < CLEAR_NS;
}

static __always_inline void note_clear(const struct tuple *t)
{
	__u64 now = bpf_ktime_get_ns();

	bpf_map_update_elem(&clear_flows, t, &now, BPF_ANY);
}

static __always_inline bool read_udp(struct __sk_buff *skb, const struct packet *p, struct udphdr *udp)
{
	return !bpf_skb_load_bytes(skb, p->l4, udp, sizeof(*udp));
}

static __always_inline void fragment_key(struct fragmented *f, __u64 netns, const struct packet *p, enum judge hook)
{
	f->netns = netns;
	f->src = p->src;
	f->dst = p->dst;
	f->id = p->id;
	f->hook = hook;
}

/* Whether the pod's UDP to remote, which is no peer, is not to leave in clear all the same. */
static __always_inline bool is_required(const struct pod *pod, const struct addr *remote)
{
	return (pod->flags & POD_REQUIRE) && !addr_is_local_scope(remote);
}

/* Of a whole datagram, or its first fragment. t: the pod's end is local. */
static __always_inline enum way way_of_flow(const struct pod *pod, const struct tuple *t, struct bpf_sock *sk)
{
	struct clear_ports *peer;

	if (bpf_map_lookup_elem(&flows, t))
		return WAY_TUNNEL;
	peer = find_peer(&t->remote, t->remote_port);
	if (!peer && (!is_required(pod, &t->remote) || (t->local_port == DHCP_CLIENT && t->remote_port == DHCP_SERVER)))
		return WAY_ELSEWHERE;
	if ((peer && in_ports(peer, t->remote_port)) || in_ports(&pod->clear, t->remote_port))
		return WAY_CLEAR_PORT;
	if (sk && bpf_sk_storage_get(&older_sockets, sk, 0, 0))
		return WAY_CLEAR_OLDER;
	return spoke_in_clear(t) ? WAY_CLEAR_ANSWER : WAY_TUNNEL;
}

/* For a pod with POD_UDP and packets of UDP. */
static __always_inline enum way way_of(struct __sk_buff *skb, __u64 netns, const struct pod *pod, const struct packet *p, enum judge hook)
{
	struct tuple t = { .netns = netns, .local = p->src, .remote = p->dst };
	struct fragmented f = {};
	struct bpf_sock *sk = skb->sk;
	struct udphdr udp;
	__u32 way, *judged;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk && bpf_sk_storage_get(&own, sk, 0, 0))
		return WAY_OWN;
	if (p->later) {
		fragment_key(&f, netns, p, hook);
		judged = bpf_map_lookup_elem(&fragments, &f);
		if (judged)
			return *judged;
		return find_peer(&p->dst, 0) || is_required(pod, &p->dst) ? WAY_TUNNEL : WAY_ELSEWHERE;
	}
	if (!read_udp(skb, p, &udp))
		return WAY_MALFORMED;
	t.local_port = bpf_ntohs(udp.source);
	t.remote_port = bpf_ntohs(udp.dest);
	way = way_of_flow(pod, &t, sk);
	if (hook == JUDGE_DIVERT && (way == WAY_CLEAR_OLDER || way == WAY_CLEAR_PORT))
		note_clear(&t); /* its answer is in clear */
	if (p->fragment) {
		fragment_key(&f, netns, p, hook);
		bpf_map_update_elem(&fragments, &f, &way, BPF_ANY); /* without: see p->later */
	}
	return way;
}
