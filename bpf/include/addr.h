/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#pragma once

#include <stdbool.h>
#include <bpf/bpf_endian.h>

#include "maps.h"

static __always_inline void addr_set_v4(struct addr *a, __be32 v4)
{
	a->word[0] = 0;
	a->word[1] = 0;
	a->word[2] = bpf_htonl(0xffff);
	a->word[3] = v4;
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] &&
	       a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

static __always_inline bool addr_is_v4(const struct addr *a)
{
	return !a->word[0] && !a->word[1] && a->word[2] == bpf_htonl(0xffff);
}

/* 0.0.0.0 or :: */
static __always_inline bool addr_is_unspecified(const struct addr *a)
{
	return !a->word[0] && !a->word[1] && !a->word[3] &&
	       (!a->word[2] || a->word[2] == bpf_htonl(0xffff));
}

/* 127.0.0.0/8 or ::1; and unspecified, which is how connect() spells loopback as well. */
static __always_inline bool addr_is_loopback(const struct addr *a)
{
	if (addr_is_unspecified(a))
		return true;
	if (addr_is_v4(a))
		return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->word[0] && !a->word[1] && !a->word[2] && a->word[3] == bpf_htonl(1);
}

/* fe80::/10; IPv4's 169.254.0.0/16 needs no scope and is an address like any other. */
static __always_inline bool addr_is_link_local(const struct addr *a)
{
	return (a->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* Multicast, broadcast and link-local, 169.254.0.0/16 included. */
static __always_inline bool addr_is_local_scope(const struct addr *a)
{
	__u32 first = bpf_ntohl(a->word[0]);

	if (!addr_is_v4(a))
		return first >> 24 == 0xff || addr_is_link_local(a);
	first = bpf_ntohl(a->word[3]);
	return first >= 0xe0000000 || first >> 16 == 0xa9fe;
}

static __always_inline bool pod_owns(const struct pod *pod, const struct addr *a)
{
#pragma unroll
	for (int i = 0; i < POD_ADDRS; i++) {
		if (i < pod->addr_count && addr_equal(&pod->addrs[i], a))
			return true;
	}
	return false;
}
