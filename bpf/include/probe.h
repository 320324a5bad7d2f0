/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The kubelet's probes reach the application and not the agent, so that they neither need an
 * identity nor an agent that lives:
 *
 *   kubelet  connect()   connect.h: by its cgroup, flags the socket in `probing`
 *            SYN         probe: the connection is in `probes`
 *   pod      SYN         steer, ingress: in `probes`, left to the application
 *            reply       guard: in `probes`, passes
 *   kubelet  close       probe: out of `probes`
 *
 * Runs for every TCP socket of the node when it opens a connection, and for flagged ones when
 * they change their state. Never has a say in anything: fails by leaving the connection to
 * be treated as plaintext.
 */
#pragma once

#include "addr.h"

enum { SOCKOPS_OK = 1, SOCKOPS_INET = 2 };

static __always_inline void read_ends(struct bpf_sock_ops *ctx, struct tuple *t)
{
	if (ctx->family == SOCKOPS_INET) {
		addr_set_v4(&t->local, ctx->remote_ip4);
		addr_set_v4(&t->remote, ctx->local_ip4);
		/* Or clang makes one load of two, from either field, which the verifier forbids. */
		asm volatile("" ::: "memory");
	} else {
		t->local.word[0] = ctx->remote_ip6[0];
		t->local.word[1] = ctx->remote_ip6[1];
		t->local.word[2] = ctx->remote_ip6[2];
		t->local.word[3] = ctx->remote_ip6[3];
		t->remote.word[0] = ctx->local_ip6[0];
		t->remote.word[1] = ctx->local_ip6[1];
		t->remote.word[2] = ctx->local_ip6[2];
		t->remote.word[3] = ctx->local_ip6[3];
	}
	t->local_port = bpf_ntohl(ctx->remote_port);
	t->remote_port = ctx->local_port;
}

static __always_inline enum counter opened(struct bpf_sock_ops *ctx, struct tuple *noted)
{
	struct tuple t = {};
	__u64 now = bpf_ktime_get_ns();
	__u64 *home;

	read_ends(ctx, &t);
	home = bpf_map_lookup_elem(&homes, &t.local);
	if (!home)
		return PROBE_ELSEWHERE;
	t.netns = *home;
	/* What would not be taken out again must not be put in. Other programs' flags stay. */
	if (bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG))
		return PROBE_REFUSED_FLAGS;
	*noted = t;
	return bpf_map_update_elem(&probes, &t, &now, BPF_ANY) ? PROBE_REFUSED_FULL : PROBE_OPENED;
}

static __always_inline enum counter closed(struct bpf_sock *sk, struct tuple *noted)
{
	struct tuple t = *noted;

	bpf_map_delete_elem(&probes, &t);
	bpf_sk_storage_delete(&probing, sk);
	return PROBE_CLOSED;
}

SEC("sockops")
int probe(struct bpf_sock_ops *ctx)
{
	bool opens = ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB;
	struct tuple *noted;
	struct bpf_sock *sk;

	if (!opens && (ctx->op != BPF_SOCK_OPS_STATE_CB || ctx->args[1] != BPF_TCP_CLOSE))
		return SOCKOPS_OK;
	sk = ctx->sk;
	if (!sk)
		return SOCKOPS_OK;
	noted = bpf_sk_storage_get(&probing, sk, 0, 0);
	if (!noted)
		return SOCKOPS_OK;
	count(opens ? opened(ctx, noted) : closed(sk, noted));
	return SOCKOPS_OK;
}
