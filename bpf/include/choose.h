/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Which listener a new connection that arrives in a pod belongs to; for steer and ingress. */
#pragma once

#include "addr.h"
#include "config.h"
#include "direct.h"

enum { LOOPBACK_IFINDEX = 1 };

struct arrival {
	struct addr local;
	struct addr remote;
	__u16 local_port; /* host byte order, as is remote_port */
	__u16 remote_port;
	bool on_loopback;
};

/*
 *   on lo,   to a foreign address    redirected by connect     outbound
 *   on lo,   to the pod              the agent to the app      left alone
 *   on eth0, from the pod's address  the pod to itself (1)     left alone
 *   to the pod's tunnel port         from anywhere             tunnel
 *   on eth0, from outside            what passage_of() leaves  inbound, if captured
 *
 * (1) For what the pod sends to its own address the kernel names the interface of that
 * address as the one of arrival, though it comes by loopback.
 */
static __always_inline enum listener choose(const struct pod *pod, const struct arrival *a)
{
	bool to_pod;

	if (addr_is_loopback(&a->local))
		return LISTENER_NONE;
	to_pod = pod_owns(pod, &a->local);
	if (a->on_loopback && !to_pod)
		return LISTENER_OUTBOUND;
	if (to_pod && a->local_port == tunnel_port)
		return LISTENER_TUNNEL;
	if (a->on_loopback || pod_owns(pod, &a->remote))
		return LISTENER_NONE;
	return LISTENER_INBOUND;
}

enum passage {
	PASSAGE_NONE,
	PASSAGE_PROBE,
	PASSAGE_DIRECT,
	PASSAGE_LEFT,
};

/*
 * What of that which choose() gives to the inbound listener is the application's. A connection by the
 * kernel arrives also in a pod whose release has just begun: its client may not know yet.
 */
static __always_inline enum passage passage_of(const struct pod *pod, __u64 netns, const struct arrival *a)
{
	struct tuple t = {
		.netns = netns,
		.local = a->local,
		.remote = a->remote,
		.local_port = a->local_port,
		.remote_port = a->remote_port,
	};

	if (arrives(&t))
		return PASSAGE_DIRECT;
	if (!(pod->flags & POD_INBOUND))
		return PASSAGE_LEFT;
	return bpf_map_lookup_elem(&probes, &t) ? PASSAGE_PROBE : PASSAGE_NONE;
}
