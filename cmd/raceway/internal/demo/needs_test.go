package demo

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestWhatIsMissingIsNamedInALineEach(t *testing.T) {
	if os.Geteuid() != 0 {
		if got := missing(t.TempDir()); len(got) != 1 || !strings.HasPrefix(got[0], "root") {
			t.Errorf("without root: %q", got)
		}
		t.Skip("the rest needs root")
	}
	netnstest.Require(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "raceway-ca"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	got := missing(dir)
	if len(got) != 1 || !strings.Contains(got[0], "raceway-agent") || !strings.Contains(got[0], "make build") {
		t.Errorf("a machine without raceway-agent lacks %q", got)
	}
	err := error(&MissingError{[]string{"one: do this", "two"}})
	if err.Error() != "the demo needs one: do this\nthe demo needs two" {
		t.Errorf("%q", err)
	}
}

func TestAFileSystemThatTheKernelLacksIsNamed(t *testing.T) {
	netnstest.Require(t)
	if line := missingFileSystem("nosuchfs", "the file system of nobody"); !strings.Contains(line, "of nobody") {
		t.Errorf("%q", line)
	}
	if line := missingFileSystem("cgroup2", "cgroup v2"); line != "" {
		t.Errorf("cgroup v2 is missing: %q", line)
	}
}

func TestMariaDBIsDemandedOnlyByItsFlag(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	found, err := findMariaDB(false)
	if err != nil {
		t.Fatal(err)
	}
	if found != nil {
		t.Skip("it is in a directory of the system")
	}
	var lacking *MissingError
	if _, err := findMariaDB(true); !errors.As(err, &lacking) || !strings.Contains(err.Error(), "apt-get install mariadb-server") {
		t.Errorf("%v, want what to install", err)
	}
}

func TestBPFObjectsAreFoundByTheirNumbers(t *testing.T) {
	for line, want := range map[string]object{
		"prog_id:\t42":  {programByID, 42},
		"map_id:\t7":    {mapByID, 7},
		"link_id:\t100": {linkByID, 100},
	} {
		if got, ok := parseObject(line); !ok || got != want {
			t.Errorf("%q is %v, %v", line, got, ok)
		}
	}
	for _, line := range []string{"", "pos:\t0", "prog_id:\t0", "prog_id:", "prog_type:\t5", "map_id:\tx"} {
		if got, ok := parseObject(line); ok {
			t.Errorf("%q is %v", line, got)
		}
	}
	netnstest.Require(t)
	for _, kind := range []objectKind{programByID, mapByID, linkByID} {
		if exists, err := bpfObjectExists(kind, 1<<31-1); exists || err != nil {
			t.Errorf("%v: %v, %v", kind, exists, err)
		}
	}
	if exists, err := bpfObjectExists(objectKind(unix.BPF_MAP_CREATE), 0); err == nil {
		t.Errorf("a command that opens nothing answers %v", exists)
	}
}

func TestAHeldObjectIsSeenAndMissedWhenItGoes(t *testing.T) {
	netnstest.Require(t)
	attr := struct{ kind, keySize, valueSize, entries, flags uint32 }{unix.BPF_MAP_TYPE_ARRAY, 4, 4, 1, 0}
	fd, err := bpf(unix.BPF_MAP_CREATE, &attr)
	if err != nil {
		t.Fatal(err)
	}
	before, err := objectsOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if len(before) != 1 {
		t.Fatalf("this process holds %v, want one map", before)
	}
	var all []object
	for o := range before {
		all = append(all, o)
	}
	if err := anyAlive(all); err == nil || !strings.Contains(err.Error(), "BPF map") {
		t.Errorf("a map that exists: %v", err)
	}
	unix.Close(fd)
	if err := until(t.Context(), func(context.Context) error { return anyAlive(all) }); err != nil {
		t.Error(err)
	}
}
