package perf

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

// worker is a process in a pod that we talk to by lines.
type worker struct {
	process *lab.Process
	in      io.Writer
	lines   chan string // closed at the end of the process's output
}

func (st *site) startWorker(p *lab.Pod, args ...string) (*worker, error) {
	command := append(slices.Clone(st.config.Worker), args...)
	cmd := exec.Command(command[0], command[1:]...)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("connect to a worker: %w", err)
	}
	// The other end is closed when the process has been waited for, and so its output been
	// copied: by exec.Cmd, because this is no file.
	out, feed := io.Pipe()
	cmd.Stdout = feed
	w := &worker{in: in, lines: make(chan string, 4)}
	if w.process, err = p.Start(cmd); err != nil {
		return nil, errors.Join(err, in.Close())
	}
	go func() {
		<-w.process.Done()
		_ = feed.Close() // never fails
	}()
	go func() {
		defer close(w.lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			w.lines <- scanner.Text() // a worker writes at most three
		}
	}()
	return w, nil
}

// line is the next line of the worker's output.
func (w *worker) line(ctx context.Context) (string, error) {
	select {
	case line, ok := <-w.lines:
		if !ok {
			return "", fmt.Errorf("the worker ended: %w%s", w.process.Wait(ctx), w.process.LogTail())
		}
		return line, nil
	case <-ctx.Done():
		return "", errors.Join(fmt.Errorf("wait for the worker: %w", ctx.Err()), w.process.Kill())
	}
}

func (w *worker) expect(ctx context.Context, want string) error {
	line, err := w.line(ctx)
	if err == nil && line != want {
		err = fmt.Errorf("the worker says %q, not %q", line, want)
	}
	return err
}
