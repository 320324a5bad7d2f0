/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Lists the TCP connections of a network namespace for the agent, one record each. */
#pragma once

#include "addr.h"
#include "kernel.h"

struct connection {
	struct addr local;
	struct addr remote;
	__u16 local_port;
	__u16 remote_port;
	__u16 listener_port; /* of a connection that is not accepted yet, else 0 */
	__u8 state;          /* as in TCP_INFO */
	__u8 own;            /* 1: a socket of the agent */
	__u32 mark;
	__u32 ifindex; /* where a late segment came in; 0: none did while nobody held the socket */
	__u32 age;     /* in SYN_SENT: milliseconds since the first SYN; else 0 */
	__u32 mss;     /* as the peer announced it; 0 when the application set a bound */
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

static __always_inline __u32 arrival_ifindex(const struct sock_common *sk)
{
	if (bpf_core_field_exists(((struct sock *)0)->sk_rx_dst_ifindex))
		return BPF_CORE_READ((struct sock *)sk, sk_rx_dst_ifindex);
	return BPF_CORE_READ((struct inet_sock *)sk, rx_dst_ifindex);
}

static __always_inline __u32 announced_mss(const struct sock_common *sk)
{
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;

	return BPF_CORE_READ(tp, rx_opt.user_mss) ? 0 : BPF_CORE_READ(tp, rx_opt.mss_clamp);
}

/* Zero when it cannot be told: nobody takes such a connection for an old one. */
static __always_inline __u32 syn_age(const struct sock_common *sk)
{
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;
	__u32 sent = BPF_CORE_READ(tp, retrans_stamp);

	if (!sent || (bpf_core_field_exists(tp->tcp_usec_ts) && BPF_CORE_READ_BITFIELD_PROBED(tp, tcp_usec_ts)))
		return 0;
	return (__u32)(bpf_ktime_get_ns() / 1000000) - sent;
}

SEC("iter/tcp")
int dump(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct connection c = {};

	if (!sk)
		return 0;
	c.state = sk->skc_state;
	if (c.state == BPF_TCP_LISTEN || c.state == BPF_TCP_CLOSE)
		return 0;
	read_addrs(sk, &c);
	c.local_port = sk->skc_num;
	c.remote_port = bpf_ntohs(sk->skc_dport);
	switch (c.state) {
	case BPF_TCP_TIME_WAIT: /* no struct sock behind it, nor in the next */
		break;
	case BPF_TCP_NEW_SYN_RECV:
		c.listener_port = BPF_CORE_READ(sk, skc_listener, __sk_common.skc_num);
		break;
	default:
		c.mark = BPF_CORE_READ((struct sock *)sk, sk_mark);
		c.own = bpf_sk_storage_get(&own, sk, 0, 0) ? 1 : 0;
		c.ifindex = arrival_ifindex(sk);
		c.mss = announced_mss(sk);
		if (c.state == BPF_TCP_SYN_SENT)
			c.age = syn_age(sk);
	}
	bpf_seq_write(ctx->meta->seq, &c, sizeof(c));
	return 0;
}
