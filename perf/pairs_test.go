package perf

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
	"github.com/raceway-mesh/raceway/perf/report"
)

// remote runs workers in a pod of a lab, whose process ends with its input or with the lab.
func remote(p *lab.Pod) Remote {
	return func(_ context.Context, args ...string) (io.ReadWriteCloser, error) {
		cmd := exec.Command(os.Args[0], append([]string{"worker"}, args...)...)
		in, err := cmd.StdinPipe()
		if err != nil {
			return nil, err
		}
		out, feed := io.Pipe()
		cmd.Stdout = feed
		process, err := p.Start(cmd)
		if err != nil {
			return nil, errors.Join(err, in.Close())
		}
		go func() {
			<-process.Done()
			_ = feed.CloseWithError(errors.New(process.LogTail())) // never fails
		}()
		return struct {
			io.Reader
			io.WriteCloser
		}{out, in}, nil
	}
}

func TestPairsAreMeasuredInTurn(t *testing.T) {
	st := &site{config: shortConfig("plain-cross"), scenario: Scenario{Name: "plain-cross"}, lab: labtest.New(t, lab.Options{})}
	if err := st.build(t.Context()); err != nil {
		t.Fatal(err)
	}
	pair := func(name string) Pair {
		return Pair{Entry: report.Entry{Name: name, Title: name}, Client: remote(st.client), Server: st.server.AddrPort(serverPort).Addr()}
	}
	c := Config{Workloads: []string{"bulk-1", "exchange-1"}, Rounds: 2, Duration: 50 * time.Millisecond, Worker: []string{"none"}}
	found, err := RunPairs(t.Context(), c, []Pair{pair("one"), pair("other")}, []Remote{remote(st.client), remote(st.server)})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one", "other"} {
		for workload, metric := range map[string]string{"bulk-1": "throughput", "exchange-1": "p99"} {
			if r := found.Find(name, workload, metric); r == nil || len(r.Rounds) != 2 || r.Min <= 0 {
				t.Errorf("%s, %s, %s: %+v", name, workload, metric, r)
			}
			if r := found.Find(name, workload, "CPU total"); r == nil || r.Min <= 0 {
				t.Errorf("%s, %s: the nodes' CPU time is %+v", name, workload, r)
			}
		}
	}
	if found.Machine.Kernel == "" || len(found.Scenarios) != 2 || len(found.Workloads) != 2 {
		t.Errorf("%+v, %+v, %+v", found.Machine, found.Scenarios, found.Workloads)
	}
	nowhere := pair("nowhere")
	nowhere.Server = st.client.AddrPort(serverPort).Addr()
	if _, err := RunPairs(t.Context(), c, []Pair{nowhere}, []Remote{remote(st.client)}); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v, want the worker's own words", err)
	}
}

func TestOnlyLoadsRunBetweenPairs(t *testing.T) {
	if err := CheckLoads(LoadNames()); err != nil {
		t.Error(err)
	}
	for _, none := range []string{report.IdleWorkload, "datagrams-512"} {
		if err := CheckLoads([]string{"bulk-1", none}); err == nil || !strings.Contains(err.Error(), strconv.Quote(none)) {
			t.Errorf("%v, want that %s is none", err, none)
		}
	}
	if err := CheckLoads(ShortLoads()); err != nil {
		t.Error(err)
	}
}
