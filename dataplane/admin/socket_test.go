package admin_test

import (
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

func newServer(path string) (*admin.Server, error) {
	return admin.New(admin.Config{Socket: path, Backend: &admintest.Backend{}, Log: slog.New(slog.DiscardHandler)})
}

func TestSocketAndItsDirectoryAreForTheOwnerAlone(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "run", "raceway")
	admintest.Serve(t, dir, "n1", &admintest.Backend{})
	for path, want := range map[string]fs.FileMode{
		dir:                           fs.ModeDir | 0o700,
		filepath.Join(dir, "n1.sock"): fs.ModeSocket | 0o600,
		filepath.Join(base, "run"):    fs.ModeDir | 0o755,
	} {
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s has the mode %v, want %v", path, info.Mode(), want)
		}
	}
}

func TestDirectoryThatExistsKeepsItsMode(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "raceway")
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	admintest.Serve(t, dir, "n1", &admintest.Backend{})
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("the directory is %v, %v, want 0750", info.Mode(), err)
	}
}

func TestSocketOfDeadAgentIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n1.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	admintest.Serve(t, filepath.Dir(path), "n1", &admintest.Backend{Running: admin.Version{Version: "new"}})
	c := admin.NewClient(path)
	defer c.Close()
	if v, err := c.Version(t.Context()); err != nil || v.Version != "new" {
		t.Errorf("Version = %v, %v", v, err)
	}
}

func TestSocketOfLiveAgentIsRefused(t *testing.T) {
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", &admintest.Backend{Running: admin.Version{Version: "first"}})
	path := filepath.Join(dir, "n1.sock")
	if _, err := newServer(path); err == nil || !strings.Contains(err.Error(), "running agent") {
		t.Fatalf("New on a live agent's socket = %v", err)
	}
	c := admin.NewClient(path)
	defer c.Close()
	if v, err := c.Version(t.Context()); err != nil || v.Version != "first" {
		t.Errorf("the live agent answers %v, %v after the attempt", v, err)
	}
}

func TestFileThatIsNoSocketIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n1.sock")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := newServer(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("New = %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file is now %q, %v", text, err)
	}
}

func TestSocketIsGoneAfterShutdown(t *testing.T) {
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", &admintest.Backend{})()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestCloseLeavesTheSocketOfASuccessor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n1.sock")
	old, err := newServer(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil { // as an operator might
		t.Fatal(err)
	}
	successor, err := newServer(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(old.Close(), old.Close()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket: %v", err)
	}
	if err := successor.Close(); err != nil {
		t.Error(err)
	}
}

func TestOverlongPathIsNamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), strings.Repeat("n", 120)+".sock")
	if _, err := newServer(path); err == nil || !strings.Contains(err.Error(), "at most 107 bytes") {
		t.Errorf("New = %v", err)
	}
}

func TestClientSaysWhyNobodyAnswers(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, "left.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{
		filepath.Join(dir, "none.sock"): "is raceway-agent running on this node?",
		left:                            "not running any more",
	} {
		c := admin.NewClient(path)
		if _, err := c.Version(t.Context()); err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), path) {
			t.Errorf("Version = %v, want %q and the path", err, says)
		}
		c.Close()
	}
}
