/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Who talks to whom, for programs at sockets that connect. */
#pragma once

#include "addr.h"

enum { SOCKOPS_INET = 2 };

/* The ends of a connecting socket as its destination sees them. */
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
