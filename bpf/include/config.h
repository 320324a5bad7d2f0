/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#pragma once

#include <stdbool.h>
#include <linux/types.h>

#include "maps.h"

/* Set by the agent before the programs are loaded; the same for all pods. */
volatile const __u32 redirect_mark;
volatile const __u16 tunnel_port;
volatile const bool can_set_retval; /* bpf_set_retval is there, Linux 5.18 */
volatile const bool can_probe; /* what probe.h needs is there */
volatile const bool can_direct; /* what direct.h needs is there */
volatile const bool can_tell_processes; /* bpf_get_current_pid_tgid is there for connect hooks */

enum {
	SOL_SOCKET_ = 1,
	SO_BINDTODEVICE_ = 25,
	SO_MARK_ = 36,
	KEEP_WHOLE = 1, /* bit of redirect_mark: a datagram that must not be fragmented */
};

/*
 * The pod that an instance of a per-pod program serves, as the cookie of its network
 * namespace. SK_LOOKUP cannot ask for the cookie, and a .rodata map per pod costs 20 to
 * 30 ms to make, so the agent replaces this immediate in each copy of the program.
 */
#define NETNS_PLACEHOLDER 0x7261636577617900

static __always_inline __u64 self_netns(void)
{
	__u64 cookie;

	asm volatile("%0 = %1 ll" : "=r"(cookie) : "i"(NETNS_PLACEHOLDER));
	return cookie;
}

static __always_inline struct pod *self_pod(__u64 cookie)
{
	return bpf_map_lookup_elem(&pods, &cookie);
}
