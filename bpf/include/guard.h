/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * TC ingress on the host's end of a pod's veth: nothing that an enrolled pod says in
 * clear over TCP gets past it, however it was sent. It trusts no mark. A packet still
 * carries the socket that sent it here, the agent's sockets are known by `own`, and they
 * vouch for packets to the peer that they are connected to.
 *
 * Judged are a SYN that opens a connection and any segment with payload. The rest (ACK,
 * RST, FIN, SYN-ACK) often comes from request sockets, TIME_WAIT or no socket at all and
 * tells nobody anything. UDP is judged where it is captured, as divert does.
 *
 * Fails closed: what it cannot judge it drops.
 */
#pragma once

#include "config.h"
#include "datagram.h"
#include "direct.h"
#include "packet.h"

/* Addresses that a pod needs before or besides its own: duplicate address detection and
 * multicast reports come from ::, neighbour discovery from fe80::/10, DHCP from 0.0.0.0. */
static __always_inline bool source_allowed(const struct pod *pod, const struct packet *p)
{
	bool datagram = p->protocol == IPPROTO_UDP;

	if (pod_owns(pod, &p->src))
		return true;
	if (addr_is_v4(&p->src))
		return addr_is_unspecified(&p->src) && (datagram || p->protocol == IPPROTO_IGMP);
	if (addr_is_unspecified(&p->src))
		return p->protocol == IPPROTO_ICMPV6;
	return addr_is_link_local(&p->src) && (datagram || p->protocol == IPPROTO_ICMPV6);
}

/* A packet of the agent's that goes where the agent's socket is connected to. The pod's
 * namespace is the pod's: one with CAP_NET_ADMIN may rewrite addresses there (NAT, TC), and
 * what the agent says in clear to one peer must not reach another. */
static __always_inline bool is_own(struct bpf_sock *sk, const struct packet *p, const struct segment *s)
{
	struct addr peer;

	if (!bpf_sk_storage_get(&own, sk, 0, 0) || sk->dst_port != s->tcp.dest)
		return false;
	/* volatile, or clang computes the field's address, which the verifier forbids. The
	 * kernel keeps an IPv4 peer in dst_ip4 for IPv6 sockets as well. */
	if (addr_is_v4(&p->dst)) {
		addr_set_v4(&peer, *(volatile __u32 *)&sk->dst_ip4);
	} else {
		peer.word[0] = *(volatile __u32 *)&sk->dst_ip6[0];
		peer.word[1] = *(volatile __u32 *)&sk->dst_ip6[1];
		peer.word[2] = *(volatile __u32 *)&sk->dst_ip6[2];
		peer.word[3] = *(volatile __u32 *)&sk->dst_ip6[3];
	}
	return addr_equal(&peer, &p->dst);
}

static __always_inline bool is_established(const struct tuple *t, bool opens)
{
	enum stage *stage = bpf_map_lookup_elem(&established, t);

	return stage && (!opens || *stage == STAGE_OPENING);
}

/*
 * Data for a connection that a process of the node has ended: the kernel alone gets it, and
 * answers with the reset that the application waits for. So a server that speaks first, to a
 * TCP probe that had hung up by then, does not send its greeting again for minutes.
 */
static __always_inline bool is_ended(struct __sk_buff *skb, const struct packet *p, const struct segment *s)
{
	return !s->tcp.syn && receiver_state(skb, p, s) == BPF_TCP_TIME_WAIT;
}

static __always_inline enum counter judge_tcp(struct __sk_buff *skb, __u64 netns, const struct packet *p)
{
	struct tuple t = { .netns = netns, .local = p->src, .remote = p->dst };
	struct segment s = {};
	struct bpf_sock *sk;
	bool opens;

	if (p->fragment)
		return GUARD_DROPPED_FRAGMENT;
	if (!read_segment(skb, p, &s))
		return GUARD_DROPPED_MALFORMED;
	opens = s.tcp.syn && !s.tcp.ack;
	if (!opens && !s.payload)
		return GUARD_PASSED_NO_DATA;
	t.local_port = bpf_ntohs(s.tcp.source);
	t.remote_port = bpf_ntohs(s.tcp.dest);
	sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk && is_own(sk, p, &s))
		return GUARD_PASSED_OWN;
	if (can_direct && ((sk && is_client(sk, &t, s.payload)) || (!opens && is_server(&t))))
		return GUARD_PASSED_DIRECT;
	if (is_established(&t, opens))
		return GUARD_PASSED_ESTABLISHED;
	if (!opens && bpf_map_lookup_elem(&probes, &t))
		return GUARD_PASSED_PROBE;
	if (is_ended(skb, p, &s))
		return GUARD_PASSED_ENDED;
	return opens ? GUARD_DROPPED_CONNECT : GUARD_DROPPED_PAYLOAD;
}

static __always_inline enum counter judge_udp(struct __sk_buff *skb, __u64 netns, const struct pod *pod, const struct packet *p)
{
	if (p->options) /* a source route may be among them */
		return GUARD_DROPPED_SOURCE_ROUTE;
	switch (way_of(skb, netns, pod, p, JUDGE_GUARD)) {
	case WAY_TUNNEL:
		return GUARD_DROPPED_DATAGRAM;
	case WAY_MALFORMED:
		return GUARD_DROPPED_MALFORMED;
	case WAY_OWN:
		return GUARD_PASSED_OWN;
	default:
		return GUARD_PASSED_NOT_TCP;
	}
}

static __always_inline enum counter judge_ip(struct __sk_buff *skb, __u64 netns, const struct pod *pod, bool check_source)
{
	struct packet p = {};

	if (!read_packet(skb, &p))
		return GUARD_DROPPED_MALFORMED;
	if (p.source_route)
		return GUARD_DROPPED_SOURCE_ROUTE;
	if (check_source && !source_allowed(pod, &p))
		return GUARD_DROPPED_FOREIGN_SOURCE;
	switch (p.protocol) {
	case IPPROTO_TCP:
		return judge_tcp(skb, netns, &p);
	case IPPROTO_UDP:
		if (pod->flags & POD_UDP)
			return judge_udp(skb, netns, pod, &p);
		return GUARD_PASSED_NOT_TCP;
	case IPPROTO_UDPLITE:
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
	case IPPROTO_IGMP:
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
		return GUARD_PASSED_NOT_TCP;
	default: /* tunnels of every kind, AH and ESP, and what nobody knows */
		return GUARD_DROPPED_PROTOCOL;
	}
}

static __always_inline enum counter judge(struct __sk_buff *skb, bool check_source)
{
	__u64 netns = self_netns();
	struct pod *pod = self_pod(netns);

	if (!pod)
		return GUARD_DROPPED_UNKNOWN_POD;
	if (skb->vlan_present)
		return GUARD_DROPPED_VLAN;
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return GUARD_PASSED_ARP;
	if (!is_ip(skb))
		return GUARD_DROPPED_ETHERTYPE;
	return judge_ip(skb, netns, pod, check_source);
}

/*
 * Data of a connection that goes by the kernel, which judge would pass as well. It comes first because most of
 * what is said between pods of a node is that, and the work of judge would show there: no look for the pod is
 * needed, as an admission is only of addresses that are the pods'.
 */
static __always_inline bool is_direct_data(struct __sk_buff *skb)
{
	struct tuple t = { .netns = self_netns() };
	struct bpf_sock *sk = skb->sk;

	if (!can_direct || !sk || skb->vlan_present || !read_plain_data(skb, &t))
		return false;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return false;
	return is_client(sk, &t, true) || (!bpf_sk_storage_get(&own, sk, 0, 0) && is_server(&t));
}

static __always_inline int enforce(struct __sk_buff *skb, bool check_source)
{
	enum counter outcome = is_direct_data(skb) ? GUARD_PASSED_DIRECT : judge(skb, check_source);

	count(outcome);
	/* UNSPEC lets the programs and filters behind this one have their say. */
	return outcome <= GUARD_PASSED_ESTABLISHED ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

SEC("tc")
int guard(struct __sk_buff *skb)
{
	return enforce(skb, true);
}

/* For further veth pairs of the pod. They have addresses of their own, which the agent is
 * not told; TCP is judged there all the same. */
SEC("tc")
int guard_more(struct __sk_buff *skb)
{
	return enforce(skb, false);
}
