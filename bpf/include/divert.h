/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * TC in the pod, one instance per pod: divert at the egress of its interfaces sends UDP for
 * peers to lo, where the pod's routing rule and steer have it delivered to the agent. A packet
 * has its source address by then, and is as large as eth0 takes, so the application sees the
 * path's MTU; one in fragments is put together again on lo. receive at the ingress notes who
 * speaks in clear, keeps peers from it where the pod is strict, and knows which agent a packet of
 * QUIC is for.
 *
 * divert fails open, since the guard sees what it lets by; receive fails closed.
 */
#pragma once
#include "choose.h"
#include "datagram.h"
#include "quic.h"

extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym __weak; /* since 6.2 */

/* Whether the application wants to hear what the path's MTU is. Else the kernel fragments. */
static __always_inline bool keeps_whole(struct bpf_sock *sk, const struct packet *p)
{
	const struct ipv6_pinfo *pinet6;
	const struct inet_sock *inet;
	__u8 discover;

	if (p->fragment || !sk || !bpf_rdonly_cast)
		return false;
	inet = bpf_rdonly_cast(sk, bpf_core_type_id_kernel(struct inet_sock));
	if (addr_is_v4(&p->dst)) {
		discover = BPF_CORE_READ_BITFIELD_PROBED(inet, pmtudisc);
		return p->dont_fragment && (discover == IP_PMTUDISC_DO || discover == IP_PMTUDISC_PROBE);
	}
	pinet6 = BPF_CORE_READ(inet, pinet6);
	discover = pinet6 ? BPF_CORE_READ_BITFIELD_PROBED(pinet6, pmtudisc) : 0;
	return discover == IP_PMTUDISC_DO || discover == IP_PMTUDISC_PROBE;
}

static __always_inline int to_loopback(struct __sk_buff *skb, const struct packet *p)
{
	__u8 nobody[ETH_ALEN] = {}; /* the address of lo */
	struct bpf_sock *sk = skb->sk;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	/* The two marks are one to the routing rule. */
	skb->mark = redirect_mark | (keeps_whole(sk, p) ? KEEP_WHOLE : 0);
	if (bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_dest), nobody, sizeof(nobody), 0)) {
		count(DIVERT_DROPPED_FRAME);
		return TC_ACT_SHOT;
	}
	count(DIVERT_TUNNEL);
	return bpf_redirect(LOOPBACK_IFINDEX, BPF_F_INGRESS);
}

SEC("tc")
int divert(struct __sk_buff *skb)
{
	__u64 netns = self_netns();
	struct packet p = {};
	struct pod *pod;

	if (is_plain_tcp(skb)) {
		count(DIVERT_NOT_UDP);
		return TC_ACT_UNSPEC;
	}
	pod = self_pod(netns);
	if (!pod || !(pod->flags & POD_UDP)) {
		count(DIVERT_OFF);
		return TC_ACT_UNSPEC;
	}
	if (!is_ip(skb) || !read_packet(skb, &p) || p.protocol != IPPROTO_UDP) {
		count(DIVERT_NOT_UDP);
		return TC_ACT_UNSPEC;
	}
	switch (way_of(skb, netns, pod, &p, JUDGE_DIVERT)) {
	case WAY_TUNNEL:
		return to_loopback(skb, &p);
	case WAY_OWN:
		count(DIVERT_OWN);
		return TC_ACT_UNSPEC;
	case WAY_ELSEWHERE:
		count(DIVERT_ELSEWHERE);
		return TC_ACT_UNSPEC;
	case WAY_CLEAR_PORT:
		count(DIVERT_CLEAR_PORT);
		return TC_ACT_UNSPEC;
	case WAY_CLEAR_OLDER:
		count(DIVERT_CLEAR_OLDER);
		return TC_ACT_UNSPEC;
	case WAY_CLEAR_ANSWER:
		count(DIVERT_CLEAR_ANSWER);
		return TC_ACT_UNSPEC;
	default:
		count(DIVERT_DROPPED_MALFORMED);
		return TC_ACT_SHOT;
	}
}

/* t: the pod's end is local. */
static __always_inline enum counter receive_flow(const struct pod *pod, const struct tuple *t)
{
	struct clear_ports *peer;
	bool left_alone;

	if (t->local_port == tunnel_port)
		return RECEIVE_TUNNEL;
	peer = find_peer(&t->remote, 0);
	if (!peer) {
		if (pod->flags & POD_REQUIRE)
			note_clear(t);
		return RECEIVE_ELSEWHERE;
	}
	left_alone = in_ports(peer, t->local_port) || in_ports(&pod->clear, t->local_port);
	if ((pod->flags & POD_STRICT) && !left_alone)
		return spoke_in_clear(t) ? RECEIVE_CLEAR : RECEIVE_DROPPED_CLEAR; /* an answer, or not */
	if (!bpf_map_lookup_elem(&flows, t))
		note_clear(t);
	return RECEIVE_CLEAR;
}

static __always_inline enum counter receive_udp(struct __sk_buff *skb, __u64 netns, const struct pod *pod, const struct packet *p)
{
	struct tuple t = { .netns = netns, .local = p->dst, .remote = p->src };
	struct fragmented f = {};
	struct udphdr udp;
	__u32 outcome, *judged;

	if (p->fragment)
		fragment_key(&f, netns, p, JUDGE_RECEIVE);
	if (p->later) {
		judged = bpf_map_lookup_elem(&fragments, &f);
		if (judged)
			return *judged;
		/* Its first fragment is still to come, and is judged. */
		return RECEIVE_ELSEWHERE;
	}
	if (!read_udp(skb, p, &udp))
		return RECEIVE_DROPPED_MALFORMED;
	t.local_port = bpf_ntohs(udp.dest);
	t.remote_port = bpf_ntohs(udp.source);
	outcome = receive_flow(pod, &t);
	if (outcome == RECEIVE_TUNNEL && !p->fragment && pod_owns(pod, &p->dst))
		return assign_quic(skb, netns, p);
	if (p->fragment)
		bpf_map_update_elem(&fragments, &f, &outcome, BPF_ANY);
	return outcome;
}

SEC("tc")
int receive(struct __sk_buff *skb)
{
	__u64 netns = self_netns();
	enum counter outcome;
	struct packet p = {};
	struct pod *pod;

	if (is_plain_tcp(skb)) {
		count(RECEIVE_NOT_UDP);
		return TC_ACT_UNSPEC;
	}
	pod = self_pod(netns);
	if (!pod || !(pod->flags & POD_UDP)) {
		count(RECEIVE_OFF);
		return TC_ACT_UNSPEC;
	}
	if (!is_ip(skb)) {
		count(RECEIVE_NOT_UDP);
		return TC_ACT_UNSPEC;
	}
	if (!read_packet(skb, &p)) {
		count(RECEIVE_DROPPED_MALFORMED);
		return TC_ACT_SHOT;
	}
	if (p.protocol != IPPROTO_UDP) {
		count(RECEIVE_NOT_UDP);
		return TC_ACT_UNSPEC;
	}
	outcome = receive_udp(skb, netns, pod, &p);
	if (outcome < RECEIVE_TUNNEL || outcome > RECEIVE_DROPPED_MALFORMED)
		outcome = RECEIVE_DROPPED_MALFORMED; /* never: of this map's own making */
	count(outcome);
	return outcome < RECEIVE_DROPPED_CLEAR ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

/* Makes every socket of a network namespace that has talked, or may be asked, an older one. */
SEC("iter/udp")
int note_older(struct bpf_iter__udp *ctx)
{
	struct udp_sock *udp = ctx->udp_sk;
	__u64 *since;

	if (!udp || bpf_sk_storage_get(&own, udp, 0, 0))
		return 0;
	since = bpf_sk_storage_get(&older_sockets, udp, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (since)
		*since = bpf_ktime_get_ns();
	return 0;
}

/* Writes a byte for each of them. */
SEC("iter/udp")
int list_older(struct bpf_iter__udp *ctx)
{
	struct udp_sock *udp = ctx->udp_sk;
	__u8 one = 1;

	if (udp && bpf_sk_storage_get(&older_sockets, udp, 0, 0))
		bpf_seq_write(ctx->meta->seq, &one, sizeof(one));
	return 0;
}
