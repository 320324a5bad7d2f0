// Command raceway is the operator's view of Raceway: it asks the node agents of this
// machine what they capture, carry, allow and refuse, and why.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// Exit codes, documented in docs/cli.md.
const (
	exitOK    = 0
	exitFound = 1 // the question was answered, and the answer is that something is wrong
	exitUsage = 2 // the question cannot be asked this way
	exitAgent = 3 // no agent could be asked, or it could not answer
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	c := &cli{
		out:       os.Stdout,
		errOut:    os.Stderr,
		now:       time.Now,
		zone:      time.Local,
		socketDir: defaultSocketDir,
		agentEnv:  os.Getenv(agentEnv),
		color:     wantColor(os.Stdout),

		kubeConfigured: kube.Configured,
	}
	code := c.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// cli is what the verbs share: where they write, whom they ask, and the global flags.
type cli struct {
	out, errOut io.Writer
	now         func() time.Time
	zone        *time.Location // of the times of day that people read
	socketDir   string
	agentEnv    string // the value of RACEWAY_AGENT
	color       bool
	flags       globalFlags

	kubeConfigured func() bool // a kubeconfig names a cluster, or this is one of its pods
}

// run executes one command line and returns its exit code.
func (c *cli) run(ctx context.Context, args []string) int {
	root := newRoot(c)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	for line := range strings.Lines(err.Error()) {
		_, _ = fmt.Fprintln(c.errOut, "raceway: "+strings.TrimSpace(line)) // nowhere left to report to
	}
	return exitCode(err)
}

// errFound is the end of a command whose answer is bad news.
var errFound = errors.New("not in order")

// usageError is a command line that cannot be carried out as written.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func exitCode(err error) int {
	var usage usageError
	var answer *admin.Error
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, errFound):
		return exitFound
	case errors.As(err, &answer) && (answer.Status == http.StatusBadRequest || answer.Status == http.StatusNotFound || answer.Status == http.StatusConflict):
		return exitUsage // a name that does not exist, or more than one that does
	}
	return exitAgent
}

// wantColor follows https://no-color.org.
func wantColor(f *os.File) bool {
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))
}
