/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * connect() of every process on the node. A TCP socket of an enrolled pod gets a mark
 * that the pod's routing rule sends to its loopback, where steer (or ingress) hands the
 * SYN to the agent. The destination stays untouched: it is the accepted socket's own
 * address, and the application's getpeername() is true. What the agent allows to a pod of the
 * same node goes by the kernel alone: see direct.h.
 *
 * Fails closed: a socket that cannot be redirected gets EPERM. While no agent listens it
 * gets ECONNREFUSED here, since the kernel could not answer its SYN: it sends no IPv4 reset
 * from an address that is not its own (ip_route_output_key_hash_rcu).
 */
#pragma once

#include <linux/in.h>

#include "addr.h"
#include "config.h"
#include "direct.h"

enum {
	CONNECT_REFUSE = 0,
	CONNECT_ALLOW = 1,
	ECONNREFUSED_ = 111,
};

struct flow {
	struct addr remote;
	__u16 port; /* host byte order */
	__u32 protocol;
};

enum verdict {
	VERDICT_LEAVE,
	VERDICT_REDIRECT,
	VERDICT_DIRECT, /* to the endpoint that is in the flow now */
	VERDICT_REFUSE,
};

static __always_inline bool agent_listens(__u64 netns)
{
	struct listener_key key = { .netns = netns, .kind = LISTENER_OUTBOUND };
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);

	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* The kubelet's connections are noted when they have a source port: see probe.h. */
static __always_inline bool is_kubelet(__u64 netns)
{
	__u32 only = 0;
	struct place *k;

	if (!can_probe)
		return false;
	k = bpf_map_lookup_elem(&kubelet, &only);
	if (!k || k->netns != netns || k->cgroup != bpf_get_current_cgroup_id())
		return false;
	return !can_tell_processes || !k->tgid || k->tgid == bpf_get_current_pid_tgid() >> 32;
}

static __always_inline enum counter not_enrolled(struct bpf_sock_addr *ctx, __u64 netns)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || !is_kubelet(netns))
		return CONNECT_NOT_ENROLLED;
	/* Without memory for it the connection is one like any other. */
	return bpf_sk_storage_get(&probing, sk, 0, BPF_SK_STORAGE_GET_F_CREATE) ? CONNECT_KUBELET : CONNECT_NOT_ENROLLED;
}

static __always_inline bool is_subflow(struct bpf_sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);

	return !tp || (bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ(tp, is_mptcp));
}

/* By the kernel, see direct.h, go only sockets that nothing is special about. */
static __always_inline bool goes_direct(struct bpf_sock *sk, __u64 netns, struct flow *f)
{
	if (!can_direct || f->protocol != IPPROTO_TCP || sk->bound_dev_if || sk->mark == redirect_mark || is_subflow(sk))
		return false;
	return choose_endpoint(sk, netns, &f->remote, &f->port);
}

static __always_inline enum verdict decide(struct bpf_sock_addr *ctx, struct flow *f)
{
	struct bpf_sock *sk;
	struct pod *pod;
	__u64 netns;

	if (f->protocol != IPPROTO_TCP && f->protocol != IPPROTO_MPTCP) {
		count(CONNECT_NOT_TCP);
		return VERDICT_LEAVE;
	}
	netns = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &netns);
	if (!pod) {
		count(not_enrolled(ctx, netns));
		return VERDICT_LEAVE;
	}
	if (!(pod->flags & POD_OUTBOUND)) {
		count(CONNECT_NOT_CAPTURING);
		return VERDICT_LEAVE;
	}
	sk = ctx->sk;
	if (!sk) {
		count(CONNECT_REFUSED_NO_SOCKET);
		return VERDICT_REFUSE;
	}
	if (bpf_sk_storage_get(&own, sk, 0, 0)) {
		count(CONNECT_OWN);
		return VERDICT_LEAVE;
	}
	if (can_direct)
		bpf_sk_storage_delete(&clients, sk); /* of an earlier connect() */
	if (addr_is_loopback(&f->remote)) {
		count(CONNECT_LOOPBACK);
		return VERDICT_LEAVE;
	}
	/* Its scope would be lost on the way through loopback. The guard stops it on eth0. */
	if (addr_is_link_local(&f->remote)) {
		count(CONNECT_LINK_LOCAL);
		return VERDICT_LEAVE;
	}
	if (pod_owns(pod, &f->remote)) {
		count(CONNECT_SELF);
		return VERDICT_LEAVE;
	}
	if (!agent_listens(netns)) {
		count(CONNECT_REFUSED_NO_AGENT);
		if (can_set_retval)
			bpf_set_retval(-ECONNREFUSED_);
		return VERDICT_REFUSE;
	}
	if (goes_direct(sk, netns, f)) {
		count(CONNECT_DIRECT);
		return VERDICT_DIRECT;
	}
	return VERDICT_REDIRECT;
}

static __always_inline int redirect(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u32 mark = redirect_mark;
	char none[16] = "";

	if (bpf_setsockopt(ctx, SOL_SOCKET_, SO_MARK_, &mark, sizeof(mark))) {
		count(CONNECT_REFUSED_MARK);
		return CONNECT_REFUSE;
	}
	/* A socket bound to eth0 would route past the rule. The kernel lets only the holder
	 * of CAP_NET_RAW unbind a socket, so others get an error instead of a bypass. */
	if (sk && sk->bound_dev_if &&
	    bpf_setsockopt(ctx, SOL_SOCKET_, SO_BINDTODEVICE_, none, sizeof(none))) {
		count(CONNECT_REFUSED_UNBIND);
		return CONNECT_REFUSE;
	}
	count(CONNECT_REDIRECTED);
	return CONNECT_ALLOW;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct flow f = { .protocol = ctx->protocol, .port = bpf_ntohs(ctx->user_port) };

	addr_set_v4(&f.remote, ctx->user_ip4);
	switch (decide(ctx, &f)) {
	case VERDICT_REDIRECT:
		return redirect(ctx);
	case VERDICT_DIRECT:
		ctx->user_ip4 = f.remote.word[3];
		ctx->user_port = bpf_htons(f.port);
		return CONNECT_ALLOW;
	case VERDICT_REFUSE:
		return CONNECT_REFUSE;
	default:
		return CONNECT_ALLOW;
	}
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct flow f = { .protocol = ctx->protocol, .port = bpf_ntohs(ctx->user_port) };

	f.remote.word[0] = ctx->user_ip6[0];
	f.remote.word[1] = ctx->user_ip6[1];
	f.remote.word[2] = ctx->user_ip6[2];
	f.remote.word[3] = ctx->user_ip6[3];
	switch (decide(ctx, &f)) {
	case VERDICT_REDIRECT:
		return redirect(ctx);
	case VERDICT_DIRECT:
		ctx->user_ip6[0] = f.remote.word[0];
		ctx->user_ip6[1] = f.remote.word[1];
		ctx->user_ip6[2] = f.remote.word[2];
		ctx->user_ip6[3] = f.remote.word[3];
		ctx->user_port = bpf_htons(f.port);
		return CONNECT_ALLOW;
	case VERDICT_REFUSE:
		return CONNECT_REFUSE;
	default:
		return CONNECT_ALLOW;
	}
}
