/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * SK_LOOKUP in the pod's network namespace: picks the socket for a SYN (and for the ACK
 * that brings a SYN cookie back), nothing else. One instance per pod.
 *
 * Fails closed: what belongs to a listener that is not there is answered by a reset.
 */
#pragma once

#include <linux/in.h>

#include "choose.h"
#include "datagram.h"

enum { AF_INET_ = 2, AF_INET6_ = 10 };

static __always_inline void read_arrival(struct bpf_sk_lookup *ctx, struct arrival *a)
{
	if (ctx->family == AF_INET_) {
		addr_set_v4(&a->local, ctx->local_ip4);
		addr_set_v4(&a->remote, ctx->remote_ip4);
		/* Or clang makes one load of two, from either field, which the verifier forbids. */
		asm volatile("" ::: "memory");
	} else {
		a->local.word[0] = ctx->local_ip6[0];
		a->local.word[1] = ctx->local_ip6[1];
		a->local.word[2] = ctx->local_ip6[2];
		a->local.word[3] = ctx->local_ip6[3];
		a->remote.word[0] = ctx->remote_ip6[0];
		a->remote.word[1] = ctx->remote_ip6[1];
		a->remote.word[2] = ctx->remote_ip6[2];
		a->remote.word[3] = ctx->remote_ip6[3];
	}
	a->local_port = ctx->local_port;
	a->remote_port = bpf_ntohs(ctx->remote_port);
	a->on_loopback = ctx->ingress_ifindex == LOOPBACK_IFINDEX;
}

/* Hands what arrived to the agent's socket at key, and drops it while there is none. */
static __always_inline int assign(struct bpf_sk_lookup *ctx, void *sockets, const struct listener_key *key,
				  enum counter counted)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(sockets, key);
	long err;

	if (!sk) {
		count(STEER_DROPPED_NO_LISTENER);
		return SK_DROP;
	}
	err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	if (err) {
		count(STEER_DROPPED_ASSIGN);
		return SK_DROP;
	}
	count(counted);
	return SK_PASS;
}

/*
 * The same for UDP, datagram by datagram, where no socket is connected to its sender:
 *
 *   on lo, of a flow that divert sends there    the agent
 *   to the pod's tunnel port                    the agent
 *   anything else                               left alone
 *
 * What the agent would get is dropped while there is none.
 */
static __always_inline int steer_udp(struct bpf_sk_lookup *ctx, struct listener_key *key)
{
	struct pod *pod = self_pod(key->netns);
	struct arrival a = {};

	if (!pod || !(pod->flags & POD_UDP)) {
		count(STEER_NOT_TCP);
		return SK_PASS;
	}
	read_arrival(ctx, &a);
	if (pod_owns(pod, &a.local)) {
		if (a.local_port == tunnel_port)
			key->kind = LISTENER_QUIC;
	} else if (a.on_loopback && !addr_is_loopback(&a.local)) {
		struct tuple t = {
			.netns = key->netns,
			.local = a.remote,
			.remote = a.local,
			.local_port = a.remote_port,
			.remote_port = a.local_port,
		};

		if (find_peer(&a.local, a.local_port) || bpf_map_lookup_elem(&flows, &t) || is_required(pod, &a.local))
			key->kind = LISTENER_DATAGRAMS;
	}
	if (key->kind == LISTENER_NONE) {
		count(STEER_LEFT);
		return SK_PASS;
	}
	return assign(ctx, &receivers, key, STEER_DATAGRAM + key->kind - LISTENER_DATAGRAMS);
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	struct listener_key key = { .netns = self_netns() };
	struct arrival a = {};
	struct pod *pod;

	if (ctx->protocol == IPPROTO_UDP)
		return steer_udp(ctx, &key);
	if (ctx->protocol != IPPROTO_TCP) {
		count(STEER_NOT_TCP);
		return SK_PASS;
	}
	pod = self_pod(key.netns);
	if (!pod) {
		count(STEER_DROPPED_UNKNOWN_POD);
		return SK_DROP;
	}
	read_arrival(ctx, &a);
	key.kind = choose(pod, &a);
	if (key.kind == LISTENER_NONE) {
		count(STEER_LEFT);
		return SK_PASS;
	}
	if (key.kind == LISTENER_INBOUND) {
		enum passage p = passage_of(pod, key.netns, &a);

		if (p == PASSAGE_LEFT) {
			count(STEER_LEFT);
			return SK_PASS;
		}
		if (p != PASSAGE_NONE) {
			count(STEER_PROBE + p - PASSAGE_PROBE);
			return SK_PASS;
		}
	}
	return assign(ctx, &listeners, &key, STEER_OUTBOUND + key.kind - LISTENER_OUTBOUND);
}
