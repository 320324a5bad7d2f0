package netns_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// A path comes from an annotation: whatever it leads to, Open must come back.
func TestOpenRefusesWhatIsNoNamespace(t *testing.T) {
	dir := t.TempDir()
	fifo, regular := filepath.Join(dir, "fifo"), filepath.Join(dir, "file")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(regular, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, regular, dir, "/dev/null"} {
		done := make(chan error, 1)
		go func() {
			ns, err := netns.Open(path)
			if err == nil {
				_ = ns.Close()
			}
			done <- err
		}()
		select {
		case err := <-done:
			if err == nil || !strings.Contains(err.Error(), "no namespace") || !strings.Contains(err.Error(), path) {
				t.Errorf("Open(%s) = %v", path, err)
			}
		case <-time.After(5 * time.Second):
			unblock(t, path)
			t.Errorf("Open(%s) waits; what it said in the end: %v", path, <-done)
		}
	}
}

// unblock lets an Open that waits for the other end of a FIFO go on.
func unblock(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
}
