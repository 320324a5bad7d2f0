package lab_test

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

func TestSegmentsSayWhoSentWhatToWhom(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := labtest.New(t, f.opts)
			server, client := addPod(t, l, "server", 1), addPod(t, l, "client", 2)
			serveEcho(t, server.Host)
			c := capture(t, l, 1)
			for i, a := range server.Addrs {
				message := nonce()
				ask(t, client.Host, netip.AddrPortFrom(a, 7), message)
				segments, err := c.Segments(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				var opened, asked, answered int
				for _, s := range segments {
					switch {
					case s.Destination == netip.AddrPortFrom(a, 7) && s.Source.Addr() == client.Addrs[i]:
						if s.SYN && !s.ACK {
							opened++
						}
						if bytes.Contains(s.Payload, message) {
							asked++
						}
					case s.Source == netip.AddrPortFrom(a, 7) && s.Destination.Addr() == client.Addrs[i]:
						if bytes.Contains(s.Payload, message) {
							answered++
						}
					}
				}
				if opened != 1 || asked != 1 || answered != 1 {
					t.Errorf("%s: %d connections, %d questions and %d answers, want one of each", a, opened, asked, answered)
				}
			}
		})
	}
}
