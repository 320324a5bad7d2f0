//go:build ignore
/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* All of Raceway's BPF programs in one object, so that they share their maps. */
#include "include/maps.h"
#include "include/connect.h"
#include "include/sockops.h"
#include "include/steer.h"
#include "include/ingress.h"
#include "include/guard.h"
#include "include/divert.h"
#include "include/dump.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
