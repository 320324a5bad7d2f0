/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * For kernels whose SK_LOOKUP cannot tell the interface of arrival (before 5.17): TC
 * ingress on the pod's eth0 and lo does what steer does. One instance per pod.
 *
 * A segment of a connection that exists is left to the kernel. Any other goes to the
 * listener: a SYN, and the ACK that answers a SYN cookie, which belongs to no socket yet.
 *
 * Fails closed: drops what belongs to a listener that is not there. TC cannot answer with
 * a reset, so a client's connect() then times out where steer would have it refused.
 */
#pragma once

#include "choose.h"
#include "packet.h"

static __always_inline bool connected(struct __sk_buff *skb, const struct packet *p, const struct segment *s)
{
	__u32 state = receiver_state(skb, p, s);

	/* A SYN may open a new connection on a tuple in TIME_WAIT (RFC 6191). */
	return state && state != BPF_TCP_LISTEN && !(state == BPF_TCP_TIME_WAIT && s->tcp.syn);
}

SEC("tc")
int ingress(struct __sk_buff *skb)
{
	struct listener_key key = { .netns = self_netns() };
	struct packet p = {};
	struct arrival a = {};
	struct segment s = {};
	struct bpf_sock *sk;
	struct pod *pod;
	long err;

	if (!is_ip(skb)) {
		count(INGRESS_NOT_TCP);
		return TC_ACT_UNSPEC;
	}
	if (!read_packet(skb, &p)) {
		count(INGRESS_DROPPED_MALFORMED);
		return TC_ACT_SHOT;
	}
	if (p.fragment && (p.protocol == IPPROTO_TCP || p.protocol == IPPROTO_DSTOPTS)) {
		count(INGRESS_DROPPED_FRAGMENT);
		return TC_ACT_SHOT;
	}
	if (p.protocol != IPPROTO_TCP) {
		count(INGRESS_NOT_TCP);
		return TC_ACT_UNSPEC;
	}
	if (!read_segment(skb, &p, &s)) {
		count(INGRESS_DROPPED_MALFORMED);
		return TC_ACT_SHOT;
	}
	pod = self_pod(key.netns);
	if (!pod) {
		count(INGRESS_DROPPED_UNKNOWN_POD);
		return TC_ACT_SHOT;
	}
	a.local = p.dst;
	a.remote = p.src;
	a.local_port = bpf_ntohs(s.tcp.dest);
	a.remote_port = bpf_ntohs(s.tcp.source);
	a.on_loopback = skb->ifindex == LOOPBACK_IFINDEX;
	key.kind = choose(pod, &a);
	if (key.kind == LISTENER_NONE) {
		count(INGRESS_LEFT);
		return TC_ACT_UNSPEC;
	}
	if (connected(skb, &p, &s)) {
		count(INGRESS_CONNECTED);
		return TC_ACT_UNSPEC;
	}
	if (key.kind == LISTENER_INBOUND) {
		enum passage p = passage_of(pod, key.netns, &a);

		if (p == PASSAGE_LEFT) {
			count(INGRESS_LEFT);
			return TC_ACT_UNSPEC;
		}
		if (p != PASSAGE_NONE) {
			count(INGRESS_PROBE + p - PASSAGE_PROBE);
			return TC_ACT_UNSPEC;
		}
	}
	sk = bpf_map_lookup_elem(&listeners, &key);
	if (!sk) {
		count(INGRESS_DROPPED_NO_LISTENER);
		return TC_ACT_SHOT;
	}
	err = bpf_sk_assign(skb, sk, 0);
	bpf_sk_release(sk);
	if (err) {
		count(INGRESS_DROPPED_ASSIGN);
		return TC_ACT_SHOT;
	}
	count(INGRESS_OUTBOUND + key.kind - LISTENER_OUTBOUND);
	return TC_ACT_UNSPEC;
}
