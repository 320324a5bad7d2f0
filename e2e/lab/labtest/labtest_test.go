package labtest_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

// A test that is interrupted runs no clean-ups of its own.
func TestAnInterruptRemovesTheLab(t *testing.T) {
	if os.Getenv("LABTEST_WAIT") != "" {
		l := labtest.New(t, lab.Options{})
		if _, err := l.Node(1).Start(exec.Command("sleep", "1000")); err != nil {
			t.Fatal(err)
		}
		fmt.Println("lab=" + l.Name())
		time.Sleep(time.Minute)
		t.Fatal("nobody interrupted")
	}
	netnstest.Require(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		child := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
		child.Env = append(os.Environ(), "LABTEST_WAIT=1")
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		name := ""
		for name == "" {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatalf("the child ended before it had a lab: %v", err)
			}
			if after, found := strings.CutPrefix(strings.TrimSpace(line), "lab="); found {
				name = after
			}
		}
		if err := child.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, lines); err != nil {
			t.Fatal(err)
		}
		err = child.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != sig {
			t.Errorf("after %v the child ended with %v", sig, err)
		}
		known, err := lab.Known()
		if err != nil {
			t.Fatal(err)
		}
		if _, there := known[name]; there {
			t.Errorf("after %v lab %s is still there", sig, name)
		}
	}
}
