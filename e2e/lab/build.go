package lab

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

const module = "github.com/raceway-mesh/raceway"

// BuildOptions says how to build.
type BuildOptions struct {
	Dir  string // where the binaries go; required
	Race bool   // with the race detector: an agent that races then ends with a report in its log
}

// Build builds commands of this module, such as raceway-agent, with the go command. It works
// inside a clone of the repository only.
func Build(ctx context.Context, opts BuildOptions, commands ...string) error {
	if opts.Dir == "" {
		return errors.New("build: no directory to build into")
	}
	args := []string{"build", "-tags", "grpcnotrace", "-o", opts.Dir + "/"} // as `make build` does
	cgo := "CGO_ENABLED=0"
	if opts.Race {
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	for _, c := range commands {
		args = append(args, module+"/cmd/"+c)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(cmd.Environ(), cgo)
	output, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("build %s: %w\n%s", strings.Join(commands, ", "), err, output)
	}
	return nil
}
