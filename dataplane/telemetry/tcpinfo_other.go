//go:build !linux

package telemetry

import "syscall"

type tcpFacts struct{ rttMicros, retransmits uint32 }

// tcpInfo knows nothing here: the data plane runs on Linux.
func tcpInfo(syscall.Conn) (tcpFacts, bool) { return tcpFacts{}, false }
