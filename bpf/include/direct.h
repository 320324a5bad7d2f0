/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Connections between two enrolled pods of this node that the agent's policy allows go by the
 * kernel alone:
 *
 *   client  connect()  connect.h: in `allowed`; picks an endpoint, notes it at the socket
 *           SYN        admit: the source port is known, the 4-tuple is in `admitted`
 *           packets    guard: the socket's tuple, and in `admitted`, passes
 *   server  SYN        steer, ingress: in `admitted`, left to the application; it has arrived
 *           packets    guard: in `admitted`, passes
 *   client  close      out of `admitted`
 *
 * Data passes only when the SYN was seen in the namespace that it was meant for, so an address
 * that is another's by now gets none.
 *
 * What is in the way of an admission makes the connection one of the agent's: the socket gets
 * the mark that connect() gives to others, and the kernel routes the SYN anew before it sends
 * it (tcp_connect, __tcp_retransmit_skb). Without its mark the guard drops the SYN.
 */
#pragma once

#include "addr.h"
#include "config.h"
#include "ends.h"
#include "kernel.h"

enum {
	LATE_NS = 60 * 1000000000LL, /* TIME_WAIT: for that long a server may hear that its client is gone */
};

static __always_inline bool in_force(const struct allowance *a)
{
	__u32 only = 0;
	__u64 *now = bpf_map_lookup_elem(&generation, &only);

	return now && *now && a->generation == *now;
}

/* For connect(): true when the socket is to go by the kernel, to *f then. */
static __always_inline bool choose_endpoint(struct bpf_sock *sk, __u64 netns, struct addr *addr, __u16 *port)
{
	struct destination asked = { .netns = netns, .addr = *addr, .port = *port };
	struct allowance *a = bpf_map_lookup_elem(&allowed, &asked);
	struct endpoint *to;
	struct direct *d;
	__u32 at;

	if (!a || !in_force(a) || !a->total)
		return false;
	at = a->total == 1 ? 0 : bpf_get_prandom_u32() % a->total;
	if (at >= a->local || at >= MAX_LOCAL)
		return false;
	to = &a->endpoints[at];
	d = bpf_sk_storage_get(&clients, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!d)
		return false;
	__builtin_memset(d, 0, sizeof(*d));
	d->asked = asked;
	d->key.netns = to->netns;
	d->key.local = to->addr;
	d->key.local_port = to->port;
	d->stage = DIRECT_CHOSEN;
	*addr = to->addr;
	*port = to->port;
	return true;
}

/* Whether the agent still allows what connect() chose, and the address is still the pod's. */
static __always_inline bool still_allowed(const struct direct *d)
{
	struct allowance *a = bpf_map_lookup_elem(&allowed, &d->asked);
	__u64 *home = bpf_map_lookup_elem(&homes, &d->key.local);

	if (!a || !in_force(a) || !home || *home != d->key.netns)
		return false;
#pragma unroll
	for (int i = 0; i < MAX_LOCAL; i++) {
		if (i < a->local && a->endpoints[i].netns == d->key.netns && a->endpoints[i].port == d->key.local_port &&
		    addr_equal(&a->endpoints[i].addr, &d->key.local))
			return true;
	}
	return false;
}

static __always_inline bool is_source(__u64 netns, const struct addr *a)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);

	return pod && pod_owns(pod, a);
}

/* Data in a SYN would be on its way before it is known where it arrives. */
static __always_inline bool is_fastopen(struct bpf_sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);

	return !tp || BPF_CORE_READ(tp, fastopen_req);
}

/* The agent's after all. */
static __always_inline void to_agent(struct bpf_sock_ops *ctx, struct direct *d, enum counter why)
{
	__u32 mark = redirect_mark;

	d->stage = DIRECT_ELSEWHERE;
	count(bpf_setsockopt(ctx, SOL_SOCKET_, SO_MARK_, &mark, sizeof(mark)) ? DIRECT_DROPPED_MARK : why);
}

static __always_inline void admit(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct direct *d)
{
	struct admission opening = { .stage = ADMISSION_OPENING, .since = bpf_ktime_get_ns() };
	struct tuple t = { .netns = d->key.netns };

	read_ends(ctx, &t);
	if (t.local_port != d->key.local_port || !addr_equal(&t.local, &d->key.local)) /* by another program */
		return to_agent(ctx, d, DIRECT_PROXIED_REWRITTEN);
	if (!is_source(d->asked.netns, &t.remote))
		return to_agent(ctx, d, DIRECT_PROXIED_SOURCE);
	if (is_fastopen(sk))
		return to_agent(ctx, d, DIRECT_PROXIED_FASTOPEN);
	/* What would not be taken out again must not be put in. Other programs' flags stay. */
	if (bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG))
		return to_agent(ctx, d, DIRECT_PROXIED_FLAGS);
	if (bpf_map_update_elem(&admitted, &t, &opening, BPF_ANY))
		return to_agent(ctx, d, DIRECT_PROXIED_FULL);
	/* Last: the agent first revokes an allowance and then looks who was admitted by it. */
	if (!still_allowed(d)) {
		bpf_map_delete_elem(&admitted, &t);
		return to_agent(ctx, d, DIRECT_PROXIED_REVOKED);
	}
	d->key = t;
	d->since = opening.since;
	d->stage = DIRECT_ADMITTED;
	count(DIRECT_OPENING);
}

static __always_inline bool peer_finished(const struct tcp_sock *tp)
{
	return BPF_CORE_READ((const struct sock_common *)tp, skc_flags) & (1 << SOCK_DONE);
}

/*
 * state is that before the end, for a socket that has ended. bytes_acked and bytes_received
 * count SYN and FIN as bytes. Not inlined, so that struct event is in the object's BTF for bpf2go.
 */
static __noinline void read_traffic(const struct tcp_sock *tp, __u32 state, struct event *e)
{
	bool finished, theirs = peer_finished(tp);
	__u64 acked = BPF_CORE_READ(tp, bytes_acked);

	finished = state == BPF_TCP_FIN_WAIT2 ||
		   ((state == BPF_TCP_CLOSING || state == BPF_TCP_LAST_ACK) &&
		    BPF_CORE_READ(tp, snd_una) == BPF_CORE_READ(tp, write_seq));
	acked -= acked > 0;
	e->sent = acked - (finished && acked);
	e->received = BPF_CORE_READ(tp, bytes_received);
	e->received -= theirs && e->received;
	e->srtt = BPF_CORE_READ(tp, srtt_us) >> 3;
	e->retransmits = BPF_CORE_READ(tp, total_retrans);
	e->error = BPF_CORE_READ((const struct sock *)tp, sk_err);
	e->clean = finished && theirs && !e->error;
}

static __always_inline void tell(struct bpf_sock *sk, const struct direct *d, enum event_kind kind, __u32 state, bool arrived)
{
	struct tcp_sock *tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	struct event *e;

	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(DIRECT_DROPPED_EVENT); /* the agent finds out when it lists the sockets */
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->what = *d;
	e->now = bpf_ktime_get_ns();
	e->kind = kind;
	e->arrived = arrived;
	if (tp)
		read_traffic(tp, state, e);
	bpf_ringbuf_submit(e, 0);
}

/*
 * Somebody has answered a SYN that did not arrive: it came from another port by then, which NAT on the
 * node gives to what could be taken for another connection. None of its data passes; the agent cuts it.
 */
static __always_inline void direct_opened(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct direct *d)
{
	struct admission *a = bpf_map_lookup_elem(&admitted, &d->key);
	bool arrived = a && a->stage == ADMISSION_ARRIVED;

	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_RTO_CB_FLAG);
	count(arrived ? DIRECT_OPENED : DIRECT_DROPPED_TRANSLATED);
	tell(sk, d, EVENT_OPENED, BPF_TCP_ESTABLISHED, arrived);
}

/* A client that has gone after its FIN, while the server has not sent its own. */
static __always_inline bool half_open(struct bpf_sock *sk, __u32 before)
{
	struct tcp_sock *tp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);

	return (before == BPF_TCP_FIN_WAIT1 || before == BPF_TCP_FIN_WAIT2) && tp && !peer_finished(tp);
}

static __always_inline void direct_ended(struct bpf_sock *sk, struct direct *d, __u32 before)
{
	struct admission *a = bpf_map_lookup_elem(&admitted, &d->key);
	bool opened = before != BPF_TCP_SYN_SENT;
	bool arrived = a && a->stage != ADMISSION_OPENING;

	count(opened ? DIRECT_CLOSED : DIRECT_FAILED);
	tell(sk, d, opened ? EVENT_CLOSED : EVENT_FAILED, before, arrived);
	if (a && half_open(sk, before)) {
		a->since = bpf_ktime_get_ns();
		a->stage = ADMISSION_ENDED;
	} else {
		bpf_map_delete_elem(&admitted, &d->key);
	}
	d->stage = DIRECT_ELSEWHERE;
}

/* A SYN that did not arrive: a NetworkPolicy may let the tunnel through and not the port. */
static __always_inline void direct_unanswered(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct direct *d)
{
	struct admission *a = bpf_map_lookup_elem(&admitted, &d->key);

	if (ctx->state != BPF_TCP_SYN_SENT || (a && a->stage != ADMISSION_OPENING))
		return;
	bpf_map_delete_elem(&admitted, &d->key);
	tell(sk, d, EVENT_UNANSWERED, BPF_TCP_SYN_SENT, false);
	to_agent(ctx, d, DIRECT_PROXIED_UNANSWERED);
}

/* For sockets with an entry in `clients`. */
static __always_inline void follow(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct direct *d)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (d->stage == DIRECT_CHOSEN)
			admit(ctx, sk, d);
		return;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		if (d->stage == DIRECT_ADMITTED)
			direct_opened(ctx, sk, d);
		return;
	case BPF_SOCK_OPS_RTO_CB:
		if (d->stage == DIRECT_ADMITTED)
			direct_unanswered(ctx, sk, d);
		return;
	case BPF_SOCK_OPS_STATE_CB:
		if (d->stage == DIRECT_ADMITTED && ctx->args[1] == BPF_TCP_CLOSE)
			direct_ended(sk, d, ctx->args[0]);
		return;
	}
}

/* For steer and ingress: a SYN of an admitted connection, in the namespace that it is for. */
static __always_inline bool arrives(const struct tuple *t)
{
	struct admission *a = bpf_map_lookup_elem(&admitted, t);

	if (!a || a->stage == ADMISSION_ENDED)
		return false;
	a->stage = ADMISSION_ARRIVED;
	return true;
}

/* For the guard: a segment of the client, from the very socket that was admitted. */
static __always_inline bool is_client(struct bpf_sock *sk, const struct tuple *t, bool payload)
{
	struct direct *d = bpf_sk_storage_get(&clients, sk, 0, 0);
	struct admission *a;

	if (!d || d->stage != DIRECT_ADMITTED || d->key.local_port != t->remote_port || d->key.remote_port != t->local_port ||
	    !addr_equal(&d->key.local, &t->remote) || !addr_equal(&d->key.remote, &t->local))
		return false;
	a = bpf_map_lookup_elem(&admitted, &d->key);
	return a && (a->stage == ADMISSION_ARRIVED || (a->stage == ADMISSION_OPENING && !payload));
}

/* For the guard: a segment with data of the server. A client that has gone answers by a reset. */
static __always_inline bool is_server(const struct tuple *t)
{
	struct admission *a = bpf_map_lookup_elem(&admitted, t);

	return a && (a->stage == ADMISSION_ARRIVED ||
		     (a->stage == ADMISSION_ENDED && bpf_ktime_get_ns() - a->since < LATE_NS));
}

/* getpeername() tells what the application asked for, and not the endpoint of a service. */
static __always_inline struct direct *asked_of(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk ? bpf_sk_storage_get(&clients, sk, 0, 0) : NULL;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct direct *d = asked_of(ctx);

	if (d) {
		ctx->user_ip4 = d->asked.addr.word[3];
		ctx->user_port = bpf_htons(d->asked.port);
	}
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct direct *d = asked_of(ctx);

	if (d) {
		ctx->user_ip6[0] = d->asked.addr.word[0];
		ctx->user_ip6[1] = d->asked.addr.word[1];
		ctx->user_ip6[2] = d->asked.addr.word[2];
		ctx->user_ip6[3] = d->asked.addr.word[3];
		ctx->user_port = bpf_htons(d->asked.port);
	}
	return 1;
}

/* Lists the live ones of the node. */
SEC("iter/bpf_sk_storage_map")
int list_direct(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct direct *d = ctx->value;
	struct sock *sk = ctx->sk;
	struct event e = {};
	__u32 state;

	if (!d || !sk || d->stage != DIRECT_ADMITTED)
		return 0;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == BPF_TCP_CLOSE)
		return 0;
	e.what = *d;
	e.now = bpf_ktime_get_ns();
	e.kind = state == BPF_TCP_SYN_SENT ? EVENT_OPENING : EVENT_LIVE;
	read_traffic((struct tcp_sock *)sk, state, &e);
	bpf_seq_write(ctx->meta->seq, &e, sizeof(e));
	return 0;
}
