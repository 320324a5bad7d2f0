package admin_test

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

// dialAs connects as another user: credentials are those of the thread that connects, and
// the thread ends with its goroutine, which never unlocks it.
func dialAs(path string, uid uintptr) (conn net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); errno != 0 {
			err = errno
			return
		}
		conn, err = net.Dial("unix", path)
	}()
	<-done
	return conn, err
}

func TestOtherUserIsRefusedWhateverTheFileModeSays(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("RACEWAY_REQUIRE_ROOT") == "1" {
			t.Fatal("root is needed to connect as another user")
		}
		t.Skip("root is needed to connect as another user")
	}
	// Not TempDir: the other user could not reach what lies in a directory for us alone.
	dir, err := os.MkdirTemp("", "raceway-admin") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	admintest.Serve(t, dir, "n1", &admintest.Backend{})
	path := filepath.Join(dir, "n1.sock")
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	conn, err := dialAs(path, 65534)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "GET /v1/version HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err := errors.Join(err, conn.Close()); err != nil {
		t.Fatal(err)
	}
	if text := string(answer); !strings.HasPrefix(text, "HTTP/1.1 403") || !strings.Contains(text, "run this as root") {
		t.Errorf("user 65534 got %q, want 403", text)
	}
}
