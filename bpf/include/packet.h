/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Reading packets for the TC programs. */
#pragma once

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>

#include "addr.h"

enum {
	MAX_EXTENSIONS = 6, /* RFC 8200 section 4.1 lists six kinds before the upper layer */
	IPV4_FRAGMENT = 0x3fff, /* more fragments, or an offset */
	IPV4_OFFSET = 0x1fff,
	IPV4_DONT_FRAGMENT = 0x4000,
	IPV6_OFFSET = 0xfff8,
};

struct packet {
	struct addr src;
	struct addr dst;
	__u32 l4;      /* offset of what follows the IP headers */
	__u8 protocol; /* what it is */
	bool fragment;
	bool later;  /* and not the first, so without ports */
	bool options; /* of IPv4 */
	bool dont_fragment; /* of IPv4 */
	__u32 id;    /* of the fragmented datagram */
	bool source_route; /* a routing header, or TCP with IPv4 options: the destination may change */
};

struct segment {
	struct tcphdr tcp;
	__u32 payload; /* bytes */
};

static __always_inline bool read_ipv4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return false;
	addr_set_v4(&p->src, ip.saddr);
	addr_set_v4(&p->dst, ip.daddr);
	p->protocol = ip.protocol;
	p->source_route = ip.ihl > 5 && ip.protocol == IPPROTO_TCP;
	p->fragment = ip.frag_off & bpf_htons(IPV4_FRAGMENT);
	p->later = ip.frag_off & bpf_htons(IPV4_OFFSET);
	p->options = ip.ihl > 5;
	p->dont_fragment = ip.frag_off & bpf_htons(IPV4_DONT_FRAGMENT);
	p->id = ip.id;
	p->l4 = ETH_HLEN + ip.ihl * 4;
	return true;
}

/* RFC 8200 section 4.5 */
struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

static __always_inline bool read_ipv6_fragment(struct __sk_buff *skb, struct packet *p)
{
	struct fragment_header f;

	if (bpf_skb_load_bytes(skb, p->l4, &f, sizeof(f)))
		return false;
	/* What follows in a later fragment is no header: stop here. Reassembly goes by the
	 * first fragment's next header. */
	p->fragment = true;
	p->later = f.offset & bpf_htons(IPV6_OFFSET);
	p->protocol = f.next;
	p->id = f.id;
	p->l4 += sizeof(f);
	return true;
}

/* Walks the extension headers. False when there are more than any honest sender needs. */
static __always_inline bool read_ipv6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;
	__u8 next;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.version != 6)
		return false;
	__builtin_memcpy(&p->src, &ip.saddr, sizeof(p->src));
	__builtin_memcpy(&p->dst, &ip.daddr, sizeof(p->dst));
	p->l4 = ETH_HLEN + sizeof(ip);
	next = ip.nexthdr;
#pragma unroll
	for (int i = 0; i <= MAX_EXTENSIONS; i++) {
		__u8 head[2]; /* next header, length in 8 bytes without the first 8 */

		switch (next) {
		case IPPROTO_ROUTING:
			p->source_route = true;
			break;
		case IPPROTO_HOPOPTS:
		case IPPROTO_DSTOPTS:
			break;
		case IPPROTO_FRAGMENT:
			return read_ipv6_fragment(skb, p);
		default:
			p->protocol = next;
			return true;
		}
		if (bpf_skb_load_bytes(skb, p->l4, head, sizeof(head)))
			return false;
		next = head[0];
		p->l4 += (head[1] + 1) * 8;
	}
	return false;
}

static __always_inline bool read_packet(struct __sk_buff *skb, struct packet *p)
{
	return skb->protocol == bpf_htons(ETH_P_IP) ? read_ipv4(skb, p) : read_ipv6(skb, p);
}

static __always_inline bool is_ip(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_IP) || skb->protocol == bpf_htons(ETH_P_IPV6);
}

/* Whether TCP is right behind the IP header, where it is in most packets: for who leaves it alone. */
static __always_inline bool is_plain_tcp(struct __sk_buff *skb)
{
	void *header = (void *)(long)skb->data + ETH_HLEN;
	void *end = (void *)(long)skb->data_end;
	struct ipv6hdr *six = header;
	struct iphdr *four = header;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		return (void *)(four + 1) <= end && four->protocol == IPPROTO_TCP;
	return skb->protocol == bpf_htons(ETH_P_IPV6) && (void *)(six + 1) <= end && six->nexthdr == IPPROTO_TCP;
}

/*
 * The ends of a TCP segment with data, by direct access: false for one in fragments, one with IPv4 options or
 * extension headers, and one whose headers are not in the linear part. src is t's local end.
 */
static __always_inline bool read_plain_data(struct __sk_buff *skb, struct tuple *t)
{
	void *header = (void *)(long)skb->data + ETH_HLEN;
	void *end = (void *)(long)skb->data_end;
	struct ipv6hdr *six = header;
	struct iphdr *four = header;
	struct tcphdr *tcp;
	__u32 l4;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		tcp = (void *)(four + 1);
		l4 = ETH_HLEN + sizeof(*four);
		if ((void *)(tcp + 1) > end || four->version != 4 || four->ihl != 5 || four->protocol != IPPROTO_TCP ||
		    four->frag_off & bpf_htons(IPV4_FRAGMENT))
			return false;
		addr_set_v4(&t->local, four->saddr);
		addr_set_v4(&t->remote, four->daddr);
	} else {
		tcp = (void *)(six + 1);
		l4 = ETH_HLEN + sizeof(*six);
		if (skb->protocol != bpf_htons(ETH_P_IPV6) || (void *)(tcp + 1) > end || six->version != 6 ||
		    six->nexthdr != IPPROTO_TCP)
			return false;
		__builtin_memcpy(&t->local, &six->saddr, sizeof(t->local));
		__builtin_memcpy(&t->remote, &six->daddr, sizeof(t->remote));
	}
	if (tcp->syn || tcp->doff < 5 || skb->len <= l4 + tcp->doff * 4)
		return false;
	t->local_port = bpf_ntohs(tcp->source);
	t->remote_port = bpf_ntohs(tcp->dest);
	return true;
}

static __always_inline bool read_segment(struct __sk_buff *skb, const struct packet *p, struct segment *s)
{
	__u32 end;

	if (bpf_skb_load_bytes(skb, p->l4, &s->tcp, sizeof(s->tcp)) || s->tcp.doff < 5)
		return false;
	end = p->l4 + s->tcp.doff * 4;
	if (end > skb->len)
		return false;
	/* By the length of the frame, not of the IP header: it is never less, and it is right
	 * for BIG TCP, whose IP length field is zero. */
	s->payload = skb->len - end;
	return true;
}

/* The state of the socket, in the namespace of the interface, that the segment is for; or 0. */
static __always_inline __u32 receiver_state(struct __sk_buff *skb, const struct packet *p, const struct segment *s)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	__u32 size, state;

	if (addr_is_v4(&p->dst)) {
		t.ipv4.saddr = p->src.word[3];
		t.ipv4.daddr = p->dst.word[3];
		t.ipv4.sport = s->tcp.source;
		t.ipv4.dport = s->tcp.dest;
		size = sizeof(t.ipv4);
	} else {
		__builtin_memcpy(t.ipv6.saddr, &p->src, sizeof(p->src));
		__builtin_memcpy(t.ipv6.daddr, &p->dst, sizeof(p->dst));
		t.ipv6.sport = s->tcp.source;
		t.ipv6.dport = s->tcp.dest;
		size = sizeof(t.ipv6);
	}
	sk = bpf_skc_lookup_tcp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state;
}
