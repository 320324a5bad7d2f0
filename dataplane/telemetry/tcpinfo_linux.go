package telemetry

import (
	"syscall"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// tcpFacts is what of TCP_INFO is reported.
type tcpFacts struct {
	rttMicros   uint32 // smoothed
	retransmits uint32 // segments, since the socket connected
}

// tcpInfo is false for a socket that is closed or not TCP.
func tcpInfo(c syscall.Conn) (facts tcpFacts, ok bool) {
	raw, err := c.SyscallConn()
	if err != nil {
		return tcpFacts{}, false
	}
	err = raw.Control(func(fd uintptr) {
		if info, err := nonblock.TCPInfo(fd); err == nil {
			facts, ok = tcpFacts{rttMicros: info.Rtt, retransmits: info.Total_retrans}, true
		}
	})
	return facts, ok && err == nil
}
