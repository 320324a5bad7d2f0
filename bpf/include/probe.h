/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The kubelet's probes reach the application and not the agent, so that they neither need an
 * identity nor an agent that lives:
 *
 *   kubelet  connect()   connect.h: by its cgroup, flags the socket in `probing`
 *            SYN         sockops: the connection is in `probes`
 *   pod      SYN         steer, ingress: in `probes`, left to the application
 *            reply       guard: in `probes`, passes
 *   kubelet  close       sockops: out of `probes`
 *
 * Never has a say in anything: fails by leaving the connection to be treated as plaintext.
 */
#pragma once

#include "addr.h"
#include "config.h"
#include "ends.h"

static __always_inline enum counter probe_opened(struct bpf_sock_ops *ctx, struct tuple *noted)
{
	struct tuple t = {};
	__u64 now = bpf_ktime_get_ns();
	__u64 *home;

	read_ends(ctx, &t);
	home = bpf_map_lookup_elem(&homes, &t.local);
	if (!home)
		return PROBE_ELSEWHERE;
	t.netns = *home;
	/* What would not be taken out again must not be put in. Other programs' flags stay. */
	if (bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG))
		return PROBE_REFUSED_FLAGS;
	*noted = t;
	return bpf_map_update_elem(&probes, &t, &now, BPF_ANY) ? PROBE_REFUSED_FULL : PROBE_OPENED;
}

static __always_inline enum counter probe_closed(struct bpf_sock *sk, struct tuple *noted)
{
	struct tuple t = *noted;

	bpf_map_delete_elem(&probes, &t);
	bpf_sk_storage_delete(&probing, sk);
	return PROBE_CLOSED;
}
