/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#pragma once

#include <linux/in6.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

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
	unsigned long skc_flags;
};

struct sock {
	struct sock_common __sk_common;
	__u32 sk_mark;
	int sk_err;
	int sk_rx_dst_ifindex; /* since 5.17, inet_sock.rx_dst_ifindex before */
};

struct ipv6_pinfo {
	__u8 pmtudisc : 3; /* a whole byte since 6.9 */
};

struct inet_sock {
	int rx_dst_ifindex;
	__u8 pmtudisc : 3; /* likewise, and always for IPv4 */
	struct ipv6_pinfo *pinet6;
};

struct udp_sock {
	struct inet_sock inet;
};

struct tcp_options_received {
	__u16 user_mss;
	__u16 mss_clamp;
};

struct tcp_sock {
	struct tcp_options_received rx_opt;
	__u64 bytes_acked;    /* SYN and FIN included */
	__u64 bytes_received; /* FIN included */
	__u32 srtt_us;        /* times 8 */
	__u32 total_retrans;
	__u32 snd_una;
	__u32 write_seq;
	struct tcp_fastopen_request *fastopen_req;
	_Bool is_mptcp; /* a subflow, of which there may be more */
	__u32 retrans_stamp; /* in SYN_SENT: when the first SYN was sent */
	__u8 tcp_usec_ts : 1; /* since 6.7: stamps are microseconds, by a route's wish */
};

enum sock_flags {
	SOCK_DONE = 1, /* the peer's FIN is in */
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct sock *sk;
	void *value;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};
#pragma clang attribute pop
