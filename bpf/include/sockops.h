/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Runs for every TCP socket of the node when it opens a connection, and for those that a
 * connect hook flagged when they change their state.
 */
#pragma once

#include "direct.h"
#include "probe.h"

enum { SOCKOPS_OK = 1 };

static __always_inline void sockops_probe(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct tuple *noted = bpf_sk_storage_get(&probing, sk, 0, 0);

	if (!noted)
		return;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		count(probe_opened(ctx, noted));
	else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE)
		count(probe_closed(sk, noted));
}

SEC("sockops")
int track(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk;
	struct direct *d;

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_RTO_CB:
	case BPF_SOCK_OPS_STATE_CB:
		break;
	default:
		return SOCKOPS_OK;
	}
	sk = ctx->sk;
	if (!sk)
		return SOCKOPS_OK;
	if (can_probe)
		sockops_probe(ctx, sk);
	if (!can_direct)
		return SOCKOPS_OK;
	d = bpf_sk_storage_get(&clients, sk, 0, 0);
	if (d)
		follow(ctx, sk, d);
	return SOCKOPS_OK;
}
