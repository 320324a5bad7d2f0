/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Lists the TCP connections of a network namespace for the agent, one record each. */
#pragma once

#include <bpf/bpf_core_read.h>

#include "addr.h"

/* The few kernel structures it looks into; field offsets are relocated at load time. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	struct sock *skc_listener;
};

struct sock {
	struct sock_common __sk_common;
	__u32 sk_mark;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};
#pragma clang attribute pop

struct connection {
	struct addr local;
	struct addr remote;
	__u16 local_port;
	__u16 remote_port;
	__u16 listener_port; /* of a connection that is not accepted yet, else 0 */
	__u8 state;          /* as in TCP_INFO */
	__u8 own;            /* 1: a socket of the agent */
	__u32 mark;
	__u32 zero;
};

/* Not inlined, so that struct connection is in the object's BTF for bpf2go. */
static __noinline void read_addrs(const struct sock_common *sk, struct connection *c)
{
	if (sk->skc_family == AF_INET_) {
		addr_set_v4(&c->local, sk->skc_rcv_saddr);
		addr_set_v4(&c->remote, sk->skc_daddr);
		return;
	}
	BPF_CORE_READ_INTO(&c->local, sk, skc_v6_rcv_saddr);
	BPF_CORE_READ_INTO(&c->remote, sk, skc_v6_daddr);
}

SEC("iter/tcp")
int dump(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct connection c = {};

	if (!sk)
		return 0;
	c.state = sk->skc_state;
	if (c.state == BPF_TCP_LISTEN || c.state == BPF_TCP_CLOSE || c.state == BPF_TCP_TIME_WAIT)
		return 0;
	read_addrs(sk, &c);
	c.local_port = sk->skc_num;
	c.remote_port = bpf_ntohs(sk->skc_dport);
	if (c.state == BPF_TCP_NEW_SYN_RECV) {
		c.listener_port = BPF_CORE_READ(sk, skc_listener, __sk_common.skc_num);
	} else {
		c.mark = BPF_CORE_READ((struct sock *)sk, sk_mark);
		c.own = bpf_sk_storage_get(&own, sk, 0, 0) ? 1 : 0;
	}
	bpf_seq_write(ctx->meta->seq, &c, sizeof(c));
	return 0;
}
