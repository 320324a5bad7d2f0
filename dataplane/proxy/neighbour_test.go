package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// roleEnv makes the test binary play an application, in a process of its own so that its
// goroutines do not queue with the proxy's.
const roleEnv = "RACEWAY_PROXY_BENCH_ROLE"

// neighbourFlows is how many bulk connections the noisy pod has.
const neighbourFlows = 200

// BenchmarkRequestBesideBulk measures a pod's request/response beside another pod of the
// node that has 200 bulk connections, with the gate and without it. All that the proxy does
// is in this process; the applications have their own.
//
//	go test -run '^$' -bench RequestBesideBulk -benchtime 300x ./dataplane/proxy
func BenchmarkRequestBesideBulk(b *testing.B) {
	for _, way := range []string{"tunnel", "plain"} {
		for _, c := range []struct {
			name   string
			bulk   bool
			limits Limits
		}{
			{"alone", false, Limits{}},
			{"gate", true, Limits{}},
			{"no gate", true, Limits{PodActive: 1 << 20, NodeActive: 1 << 20}},
		} {
			for _, procs := range []int{runtime.NumCPU(), 2 * runtime.NumCPU()} {
				b.Run(fmt.Sprintf("%s/%s/GOMAXPROCS=%d", way, c.name, procs), func(b *testing.B) {
					defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
					benchmarkNeighbour(b, way == "tunnel", c.bulk, c.limits)
				})
			}
		}
	}
}

func benchmarkNeighbour(b *testing.B, tunnel, bulk bool, limits Limits) {
	w := newWorld(b, func(c *Config) { c.Limits = limits })
	server := netip.MustParseAddr("127.0.0.1")
	if tunnel {
		server = w.db.addr
	}
	// quiet talks to still, as web does to db.
	quiet, still := newFakePod(b, "quiet", w.db.addr.Next().String()), newFakePod(b, "still", w.db.addr.Next().Next().String())
	w.publish(func(c *dataplane.Contents) {
		from, to := quiet.workload("node1"), still.workload("node2")
		from.ServiceAccount, to.ServiceAccount = "web", "db"
		c.Workloads = append(c.Workloads, from, to)
		c.Captured["quiet"], c.Captured["still"] = true, true
	})
	w.serve(w.nodes[0], quiet)
	w.serve(w.nodes[1], still)
	sink := start(b, "sink", server.String())
	if tunnel {
		server = still.addr
	}
	echo := start(b, "echo", server.String())
	targets := map[netip.AddrPort]netip.AddrPort{addrPort(w.web.outbound.Addr()): sink.addr, addrPort(quiet.outbound.Addr()): echo.addr}
	w.nodes[0].addresses = func(c *netns.Conn) (destination, client netip.AddrPort) {
		return targets[c.Local()], c.Remote()
	}
	if bulk {
		start(b, "bulk", w.web.outbound.Addr().String())
		// Without the gate the first connections starve the accepting of the others, so
		// that it is measured beside those that are there after a while.
		for deadline := time.Now().Add(15 * time.Second); w.nodes[0].Live("web") < neighbourFlows && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(300 * time.Millisecond) // windows and socket buffers fill
	}
	before, began := w.moved(), time.Now()
	ping := start(b, "ping", quiet.outbound.Addr().String(), strconv.Itoa(max(b.N, 100)))
	b.ResetTimer()
	fields := strings.Fields(ping.wait(b))
	b.StopTimer()
	for i, name := range []string{"p50-µs", "p99-µs", "p99.9-µs"} {
		value, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(value, name)
	}
	b.ReportMetric(float64(w.nodes[0].Live("web")), "bulk-conns")
	b.ReportMetric(float64(w.moved()-before)/1e6/time.Since(began).Seconds(), "bulk-MB/s")
}

// moved is how many bytes the noisy pod has sent.
func (w *world) moved() (sum uint64) {
	for _, c := range w.nodes[0].telemetry.Connections() {
		if c.Source.Workload == "web" {
			sum += c.Sent
		}
	}
	return sum
}

// role is a child process that plays an application. It ends with its standard input.
type role struct {
	addr netip.AddrPort // of one that listens
	out  *bufio.Reader
}

func start(b *testing.B, args ...string) *role {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleEnv+"="+strings.Join(args, " "))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	r := &role{out: bufio.NewReader(out)}
	if args[0] == "echo" || args[0] == "sink" {
		if r.addr, err = netip.ParseAddrPort(strings.TrimSpace(r.wait(b))); err != nil {
			b.Fatal(err)
		}
	}
	return r
}

// wait returns the role's next line.
func (r *role) wait(b *testing.B) string {
	b.Helper()
	line, err := r.out.ReadString('\n')
	if err != nil {
		b.Fatal("the application's process: ", err)
	}
	return line
}

// play is the child process.
func play(args []string) error {
	over := make(chan struct{})
	go func() {
		defer close(over)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	switch args[0] {
	case "echo", "sink":
		l, err := net.Listen("tcp", net.JoinHostPort(args[1], "0"))
		if err != nil {
			return err
		}
		fmt.Println(l.Addr())
		go serveRole(l, args[0] == "echo")
	case "bulk":
		for range neighbourFlows {
			c, err := net.Dial("tcp", args[1])
			if err != nil {
				return err
			}
			go func() {
				chunk := make([]byte, 64<<10)
				for err := error(nil); err == nil; {
					_, err = c.Write(chunk)
				}
			}()
		}
	case "pour":
		return pour(args[1], args[2], args[3])
	case "ping":
		return ping(args[1], args[2])
	case "chatter":
		return chatter(args[1], args[2])
	}
	<-over
	return nil
}

func serveRole(l net.Listener, answer bool) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			buf := make([]byte, 64<<10)
			for {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				if answer {
					_, _ = c.Write(buf[:n])
				}
			}
		}()
	}
}

// ping makes requests of 128 bytes one after the other, a millisecond apart, and prints
// quantiles in microseconds.
func ping(addr, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	took, err := ask(addr, 128, func(made int) bool {
		if made > 0 {
			time.Sleep(time.Millisecond)
		}
		return made < n
	})
	if err != nil {
		return err
	}
	fmt.Println(quantile(took, 0.5), quantile(took, 0.99), quantile(took, 0.999))
	return nil
}

// ask makes requests of that many bytes one after the other while more wants another, and returns
// how long each took, the shortest first.
func ask(addr string, size int, more func(made int) bool) ([]time.Duration, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, size)
	var took []time.Duration
	for more(len(took)) {
		start := time.Now()
		if _, err := c.Write(buf); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return nil, err
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took, nil
}

// quantile of sorted times is in microseconds.
func quantile(took []time.Duration, q float64) float64 {
	return float64(took[min(len(took)-1, int(q*float64(len(took))))].Nanoseconds()) / 1000
}

// pour sends on that many connections, prints a line after a second and how many bytes it sent
// in the time after that.
func pour(addr, streams, duration string) error {
	n, err := strconv.Atoi(streams)
	if err != nil {
		return err
	}
	d, err := time.ParseDuration(duration)
	if err != nil {
		return err
	}
	var sent atomic.Int64
	for range n {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		go func() {
			chunk := make([]byte, 256<<10)
			for {
				n, err := c.Write(chunk)
				sent.Add(int64(n))
				if err != nil {
					return
				}
			}
		}()
	}
	time.Sleep(time.Second)
	before := sent.Load()
	fmt.Println()
	time.Sleep(d)
	fmt.Println(sent.Load() - before)
	return nil
}

// chatter makes requests of 1 KiB one right after the other, and prints quantiles in
// microseconds and how many it made in a second.
func chatter(addr, duration string) error {
	d, err := time.ParseDuration(duration)
	if err != nil {
		return err
	}
	began := time.Now()
	took, err := ask(addr, 1024, func(int) bool { return time.Since(began) < d })
	if err != nil {
		return err
	}
	fmt.Println(quantile(took, 0.5), quantile(took, 0.99), float64(len(took))/d.Seconds())
	return nil
}
