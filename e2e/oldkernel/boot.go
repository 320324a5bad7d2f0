package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// boot shows what the machine prints and returns nil when it says that all passed.
func (m machine) boot(ctx context.Context, kernel, initrd string) error {
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi",
		// Without -cx16 newer kernels crash under emulation.
		"-cpu", "max,-cx16",
		"-smp", strconv.Itoa(m.cpus), "-m", m.memory,
		"-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyS0 panic=-1 quiet mitigations=off",
		"-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", "-nic", "none",
	)
	cmd.Stderr = os.Stderr
	console, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	verdict := watch(console)
	if err := cmd.Wait(); err != nil {
		return errors.Join(fmt.Errorf("qemu: %w", err), verdict)
	}
	return verdict
}

// watch copies the console and looks for the guest's verdict.
func watch(console io.Reader) error {
	verdict := errors.New("the machine ended without a verdict")
	lines := bufio.NewScanner(console)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		fmt.Println(line)
		switch {
		case line == "guest: PASSED":
			verdict = nil
		case strings.HasPrefix(line, "guest: FAILED"):
			verdict = errors.New("tests failed on the old kernel")
		}
	}
	return errors.Join(verdict, lines.Err())
}
