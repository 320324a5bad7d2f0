package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/cmd/internal/version"
	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newBugReport(c *cli) *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "bug-report",
		Short: "Collect what a maintainer needs, without secrets, in one file",
		Long: `Write a .tar.gz with what every agent answers (versions, checks, workloads, services, policies,
certificates without keys, connections, recent flows) and, of a cluster, the objects and logs of
the installation, the policies and the nodes. No Secret is read and no private key is anywhere
else; addresses, names and identities of pods are in it.

What could not be collected is in errors.txt inside it, and the exit code is 3.`,
		Example: `  raceway bug-report
  raceway bug-report --file /tmp/report.tar.gz`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if path == "" {
				path = "raceway-bug-report-" + c.now().UTC().Format("20060102T150405Z") + ".tar.gz"
			}
			return c.bugReport(cmd.Context(), path)
		},
	}
	cmd.Flags().StringVar(&path, "file", "", "file to write (default: raceway-bug-report-<time>.tar.gz)")
	return cmd
}

func (c *cli) bugReport(ctx context.Context, path string) (err error) {
	f, err := c.fleet()
	if err != nil {
		return err
	}
	// It holds names and addresses of everything: for its owner's eyes.
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return usagef("bug report: %w", err)
	}
	archive := newArchive(file, c)
	lacking := c.collect(ctx, f, archive.add)
	if lacking != nil {
		err = archive.add(kube.File{Name: "errors.txt", Data: []byte(lacking.Error() + "\n")})
	}
	if err := errors.Join(err, archive.close(), file.Close()); err != nil {
		return fmt.Errorf("bug report %s: %w", path, err)
	}
	return errors.Join(c.say("wrote %s", path), lacking)
}

// collect emits the report's files, and returns what it could not have.
func (c *cli) collect(ctx context.Context, f fleet, emit func(kube.File) error) error {
	errs := []error{emit(kube.File{Name: "version.txt", Data: []byte(version.String() + "\n")})}
	if p, clustered := f.(pods); clustered {
		findings, err := p.Check(ctx)
		errs = append(errs, err, emitJSON(emit, "cluster-check.json", findings), p.Report(ctx, emit))
	}
	agents, err := c.anyAgents(ctx)
	errs = append(errs, err)
	answers := ask(ctx, agents, func(ctx context.Context, a agent) (map[string]any, error) { return everything(ctx, a) })
	for _, a := range answers {
		errs = append(errs, a.err)
		for name, value := range a.value {
			errs = append(errs, emitJSON(emit, "agents/"+a.agent+"/"+name+".json", value))
		}
	}
	return errors.Join(errs...)
}

// everything is all that an agent tells; what it could not is in the error.
func everything(ctx context.Context, a agent) (map[string]any, error) {
	told := make(map[string]any)
	var errs []error
	take := func(name string, value any, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			return
		}
		told[name] = value
	}
	running, err := a.Version(ctx)
	take("version", running, err)
	findings, err := a.Check(ctx)
	take("check", findings, err)
	workloads, err := a.Workloads(ctx)
	take("workloads", workloads, err)
	services, err := a.Services(ctx)
	take("services", services, err)
	policies, err := a.Policies(ctx)
	take("policies", policies, err)
	certificates, err := a.Certificates(ctx)
	take("certificates", certificates, err)
	connections, err := a.Connections(ctx)
	take("connections", connections, err)
	var flows []admin.Flow
	err = a.Flows(ctx, false, func(f admin.Flow) error {
		flows = append(flows, f)
		return nil
	})
	take("flows", flows, err)
	return told, errors.Join(errs...)
}

func emitJSON(emit func(kube.File) error, name string, value any) error {
	data, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return emit(kube.File{Name: name, Data: append(data, '\n')})
}

// archive is a compressed tar of files that are as old as the report.
type archive struct {
	cli *cli
	zip *gzip.Writer
	tar *tar.Writer
}

func newArchive(to io.Writer, c *cli) *archive {
	zip := gzip.NewWriter(to)
	return &archive{cli: c, zip: zip, tar: tar.NewWriter(zip)}
}

func (a *archive) add(f kube.File) error {
	header := &tar.Header{Name: "raceway-bug-report/" + f.Name, Mode: 0o600, Size: int64(len(f.Data)), ModTime: a.cli.now()}
	if err := a.tar.WriteHeader(header); err != nil {
		return err
	}
	_, err := a.tar.Write(f.Data)
	return err
}

func (a *archive) close() error { return errors.Join(a.tar.Close(), a.zip.Close()) }
