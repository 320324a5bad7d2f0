package paths

import (
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// info is false for a connection that is closed or not TCP. What the peer says to have got twice
// was not lost (DSACK, RFC 2883).
func info(c syscall.Conn) (seen counts, rtt time.Duration, ok bool) {
	raw, err := c.SyscallConn()
	if err != nil {
		return counts{}, 0, false
	}
	err = raw.Control(func(fd uintptr) {
		i, err := nonblock.TCPInfo(fd)
		if err != nil {
			return
		}
		seen = counts{segments: uint64(i.Data_segs_out), lost: uint64(max(i.Total_retrans, i.Dsack_dups) - i.Dsack_dups)}
		seen.bytes, seen.busy = i.Bytes_acked, time.Duration(i.Busy_time)*time.Microsecond
		rtt, ok = time.Duration(i.Rtt)*time.Microsecond, true
	})
	return seen, rtt, ok && err == nil
}
