package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/cmd/internal/version"
	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
	"github.com/raceway-mesh/raceway/perf"
	"github.com/raceway-mesh/raceway/perf/report"
)

// perfJob is one run of the verb.
type perfJob struct {
	perf.Config
	kube.Bench
	print   bool
	timeout time.Duration // for the pods to run
	out     string
}

func newPerfJob(c *cli) *cobra.Command {
	var j perfJob
	cmd := &cobra.Command{
		Use:   "job",
		Short: "Measure between two nodes of a cluster, with the mesh and without",
		Long: `Run four Jobs on two nodes of a cluster, or on one: a client's and a server's pod in the mesh, and
two that are not, of the agents' image. Load goes between them in turn, pair by pair, and the
table shows medians. CPU is that of both machines as a whole, so that whatever else they do counts
as well. The Jobs are deleted in the end, and end by themselves if this command is killed.

They are in namespace ` + kube.DefaultBenchNamespace + `, which comes and goes with them, or in that of --namespace,
which has to be there; policies apply as to any pod there. It needs the right to make Jobs (and the
namespace), to list pods, and to create pods/exec in it.`,
		Example: `  raceway perf job --client-node node1 --server-node node2
  raceway perf job --client-node node1 --server-node node1 --workloads bulk-1,exchange-32
  raceway perf job --client-node node1 --server-node node2 --print`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Not SIGPIPE: a connection to the API server that ends first would be one.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGHUP, syscall.SIGQUIT)
			defer stop()
			return j.run(ctx, c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&j.ClientNode, "client-node", "", "node of the clients (required)")
	f.StringVar(&j.ServerNode, "server-node", "", "node of the servers (required)")
	f.StringVar(&j.Image, "image", "", "image with this program; default that of the agent of the client's node")
	f.StringSliceVar(&j.Workloads, "workloads", perf.ShortLoads(), "which, of "+strings.Join(perf.LoadNames(), ", "))
	f.IntVar(&j.Rounds, "rounds", 5, "how often each is measured, interleaved")
	f.DurationVar(&j.Duration, "duration", 2*time.Second, "of one measurement")
	f.Float64Var(&j.Rate, "rate", 1000, "requests per second of the paced workloads")
	f.DurationVar(&j.timeout, "timeout", 2*time.Minute, "how long to wait for the pods to run")
	f.BoolVar(&j.print, "print", false, "print the manifests and do nothing")
	f.StringVar(&j.out, "out", ".", "directory for the JSON")
	return cmd
}

func (j *perfJob) run(ctx context.Context, c *cli) (err error) {
	if j.ClientNode == "" || j.ServerNode == "" {
		return usagef("perf job: name the nodes with --client-node and --server-node; they may be the same")
	}
	if j.Rounds < 1 || j.Duration <= 0 || j.Rate <= 0 {
		return usagef("perf job: rounds, duration and rate have to be positive")
	}
	if err := perf.CheckLoads(j.Workloads); err != nil {
		return usageError{err}
	}
	cluster, err := c.cluster()
	if err != nil {
		return err
	}
	if j.Namespace = c.flags.namespace; j.Namespace == "" {
		j.Namespace = kube.DefaultBenchNamespace
	}
	if j.Image == "" {
		if j.Image, err = cluster.BenchImage(ctx, j.ClientNode); err != nil {
			return err
		}
	}
	measurements := time.Duration(2 * j.Rounds * len(j.Workloads))
	j.Deadline = j.timeout + 5*time.Minute + measurements*(2*j.Duration+5*time.Second)
	if j.print {
		return j.printObjects(c.out)
	}
	j.Log = slog.New(slog.NewTextHandler(c.errOut, nil))
	found, err := j.measure(ctx, cluster)
	if err != nil {
		return err
	}
	if err := found.WriteTable(c.out); err != nil {
		return fmt.Errorf("print the table: %w", err)
	}
	path, err := found.WriteJSON(j.out)
	if err != nil {
		return err
	}
	return c.say("\nAll rounds are in %s.", path)
}

func (j *perfJob) measure(ctx context.Context, cluster *kube.Cluster) (_ *report.Report, err error) {
	j.Log.Info("start the pods", "namespace", j.Namespace, "client", j.ClientNode, "server", j.ServerNode, "image", j.Image)
	start, cancel := context.WithTimeout(ctx, j.timeout)
	defer cancel()
	bench, err := cluster.StartBench(start, j.Bench)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bench.Close(context.WithoutCancel(ctx))) }()
	remote := func(r kube.BenchRole) perf.Remote {
		return func(ctx context.Context, args ...string) (io.ReadWriteCloser, error) {
			return bench.Work(ctx, r, args...)
		}
	}
	var pairs []perf.Pair
	for _, mesh := range []bool{false, true} {
		p := perf.Pair{Entry: report.Entry{Name: "plain", Title: "no mesh"}, Client: remote(kube.BenchRole{Mesh: mesh})}
		if mesh {
			p.Entry = report.Entry{Name: "mesh", Title: "Raceway"}
		}
		if p.Server, err = bench.Addr(kube.BenchRole{Mesh: mesh, Server: true}); err != nil {
			return nil, err
		}
		pairs = append(pairs, p)
	}
	nodes := []perf.Remote{remote(kube.BenchRole{})}
	if j.ServerNode != j.ClientNode {
		nodes = append(nodes, remote(kube.BenchRole{Server: true}))
	}
	found, err := perf.RunPairs(ctx, j.Config, pairs, nodes)
	if err != nil {
		return nil, err
	}
	found.Machine.Commit, found.Machine.Command = version.String(), "raceway "+strings.Join(os.Args[1:], " ")
	return found, nil
}

// printObjects writes the manifests as a stream of YAML.
func (j *perfJob) printObjects(out io.Writer) error {
	for _, o := range j.Objects() {
		fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
		if err != nil {
			return fmt.Errorf("print the manifests: %w", err)
		}
		delete(fields, "status")
		text, err := yaml.Marshal(fields)
		if err != nil {
			return fmt.Errorf("print the manifests: %w", err)
		}
		if _, err := fmt.Fprintf(out, "---\n%s", text); err != nil {
			return fmt.Errorf("print the manifests: %w", err)
		}
	}
	return nil
}
