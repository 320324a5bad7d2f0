/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whose a packet of QUIC is, where an agent drains beside the one that has the node:
 *
 *   destination connection ID begins with a mark    the agent's that gave it out
 *   anything else, as a client's first packet       steer's: the agent's that has the node
 *
 * All of a pod's agents speak from one port with the same peers, so that addresses do not tell
 * them apart. It looks at what no version of QUIC may change (RFC 8999). A client that makes up an
 * ID with the mark of another reaches an agent that accepts no more, as if its packet were lost.
 *
 * Fails towards steer: whoever gets a packet of a connection that is not its own resets it, which
 * is right once the other one is gone. Such a reset itself bears no ID (RFC 9000 section 10.3), so
 * an agent that drains gets none of its peers' and goes by their silence.
 */
#pragma once
#include <linux/udp.h>
#include "packet.h"

enum {
	QUIC_LONG_HEADER = 0x80,
	QUIC_LONG_ID = 6, /* behind the version and its own length */
	QUIC_SHORT_ID = 1,
	QUIC_SEGMENTS = 128, /* the most that the kernel takes for one packet */
};

static __always_inline bool read_mark(struct __sk_buff *skb, __u32 offset, struct quic_key *key)
{
	__u8 first;

	if (bpf_skb_load_bytes(skb, offset, &first, sizeof(first)))
		return false;
	offset += first & QUIC_LONG_HEADER ? QUIC_LONG_ID : QUIC_SHORT_ID;
	return !bpf_skb_load_bytes(skb, offset, key->mark, sizeof(key->mark));
}

/* Whether all segments of a packet have one mark: the kernel may have put together (GRO) what two agents get. */
static __always_inline bool is_mixed(struct __sk_buff *skb, __u32 offset, const struct quic_key *key)
{
	struct quic_key other = {};

	for (int i = 1; i < QUIC_SEGMENTS; i++) {
		if (i >= skb->gso_segs)
			return false;
		offset += skb->gso_size;
		if (!read_mark(skb, offset, &other))
			return false;
		if (other.mark[0] != key->mark[0] || other.mark[1] != key->mark[1])
			return true;
	}
	return false;
}

/* Hands a packet for the pod's tunnel port to the agent whose mark it bears. */
static __always_inline enum counter assign_quic(struct __sk_buff *skb, __u64 netns, const struct packet *p)
{
	struct quic_key key = { .netns = netns };
	__u32 payload = p->l4 + sizeof(struct udphdr);
	struct bpf_sock *sk;
	long err;

	if (!read_mark(skb, payload, &key))
		return RECEIVE_TUNNEL;
	if (is_mixed(skb, payload, &key))
		return RECEIVE_DROPPED_MIXED; /* QUIC sends it again */
	sk = bpf_map_lookup_elem(&quic_marks, &key);
	if (!sk)
		return RECEIVE_TUNNEL;
	err = bpf_sk_assign(skb, sk, 0);
	bpf_sk_release(sk);
	return err ? RECEIVE_TUNNEL : RECEIVE_CONNECTION;
}
