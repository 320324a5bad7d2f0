package proxy

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// BenchmarkBulk measures what bulk costs through both proxies, which are in this process,
// beside a bare pair of relays with a TLS connection for each TCP connection. Figures of the
// same run compare; the CPU time is the whole machine's, applications included.
//
//	go test -run '^$' -bench Bulk -benchtime 3s ./dataplane/proxy
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 8} {
		for _, way := range []string{"direct", "tls-pair", "mesh"} {
			b.Run(fmt.Sprintf("%s/%d", way, streams), func(b *testing.B) { benchmarkBulk(b, way, streams) })
		}
	}
}

// BenchmarkPing measures a request and its answer on the same paths.
func BenchmarkPing(b *testing.B) {
	for _, way := range []string{"direct", "tls-pair", "mesh"} {
		b.Run(way, func(b *testing.B) {
			to := path(b, way, "echo")
			before, began := machineCPU(b), time.Now()
			fields := strings.Fields(start(b, "chatter", to, "3s").wait(b))
			for i, name := range []string{"p50-µs", "p99-µs", "1/s"} {
				value, err := strconv.ParseFloat(fields[i], 64)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(value, name)
				if name == "1/s" {
					b.ReportMetric((machineCPU(b)-before)/(value*time.Since(began).Seconds())*1e6, "CPU-µs/op")
				}
			}
		})
	}
}

func benchmarkBulk(b *testing.B, way string, streams int) {
	to := path(b, way, "sink")
	pour := start(b, "pour", to, strconv.Itoa(streams), "3s")
	pour.wait(b) // it is warm
	before, began := machineCPU(b), time.Now()
	bytes, err := strconv.ParseFloat(strings.TrimSpace(pour.wait(b)), 64)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric((machineCPU(b)-before)/(bytes/1e9), "CPU-s/GB")
	b.ReportMetric(bytes*8/1e9/time.Since(began).Seconds(), "Gbit/s")
}

// path is where a client connects to reach a server of that role by that way.
func path(b *testing.B, way, server string) string {
	switch way {
	case "direct":
		return start(b, server, "127.0.0.1").addr.String()
	case "tls-pair":
		to := start(b, server, "127.0.0.1").addr
		return tlsPair(b, to)
	}
	w := newWorld(b)
	to := start(b, server, w.db.addr.String()).addr
	w.nodes[0].addresses = func(c *netns.Conn) (destination, client netip.AddrPort) {
		return to, c.Remote()
	}
	return w.web.outbound.Addr().String()
}

// tlsPair relays to an address through a connection of mutual TLS for each that it accepts.
func tlsPair(b *testing.B, to netip.AddrPort) string {
	ca := hbonetest.NewCA(b)
	client, server := ca.ClientTLS(b, hbonetest.ClientID, hbonetest.ServerID), ca.ServerTLS(b, hbonetest.ServerID)
	client.DynamicRecordSizingDisabled, server.DynamicRecordSizingDisabled = true, true
	second := relayEach(b, func(c net.Conn) net.Conn { return tls.Server(c, server) }, func() (net.Conn, error) {
		return net.Dial("tcp", to.String())
	})
	return relayEach(b, func(c net.Conn) net.Conn { return c }, func() (net.Conn, error) {
		return tls.Dial("tcp", second, client)
	})
}

func relayEach(b *testing.B, accepted func(net.Conn) net.Conn, dial func() (net.Conn, error)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				x := accepted(raw)
				y, err := dial()
				if err != nil {
					_ = x.Close()
					return
				}
				b.Cleanup(func() { _, _ = x.Close(), y.Close() })
				go shovel(x, y)
				shovel(y, x)
			}()
		}
	}()
	return l.Addr().String()
}

func shovel(dst io.Writer, src io.Reader) {
	_, _ = io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 128<<10))
}

// machineCPU is the busy time of all CPUs since the start of the machine, in seconds: user,
// nice, system, irq and softirq of /proc/stat (proc(5)), in units of 10 ms.
func machineCPU(b *testing.B) float64 {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat))
	sum := 0.0
	for _, i := range []int{1, 2, 3, 6, 7} {
		ticks, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			b.Fatal(err)
		}
		sum += ticks / 100
	}
	return sum
}
