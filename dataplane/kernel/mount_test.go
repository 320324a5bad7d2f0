package kernel

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCgroup2IsFoundInMountinfo(t *testing.T) {
	const (
		v1      = "31 23 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n"
		unified = "40 23 0:35 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw\n"
		part    = "41 23 0:35 /kubepods /part rw - cgroup2 cgroup2 rw\n"
		spaced  = "42 23 0:35 / /a\\040place rw - cgroup2 cgroup2 rw\n"
		hidden  = "43 23 0:35 / /hidden rw - cgroup2 cgroup2 rw\n"
	)
	for _, c := range []struct{ name, mounts, want string }{
		{"none", v1, ""},
		{"beside v1", v1 + unified, "/sys/fs/cgroup/unified"},
		{"a part of the hierarchy is not its root", part + unified, "/sys/fs/cgroup/unified"},
		{"escaped path", spaced, "/a place"},
		{"hidden by a later mount", hidden + spaced, "/a place"},
		{"broken line", "nonsense\n" + unified, "/sys/fs/cgroup/unified"},
	} {
		t.Run(c.name, func(t *testing.T) {
			present := func(path string) bool { return path != "/hidden" }
			got, err := findCgroup2(bufio.NewScanner(strings.NewReader(c.mounts)), present)
			if err != nil || got != c.want {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func TestCgroupRootIsFoundBesideVersion1(t *testing.T) {
	root, release, err := CgroupRoot("")
	if err != nil {
		t.Skipf("no cgroup v2 here: %v", err) // and no right to mount it
	}
	defer func() { _ = release() }()
	hybrid := t.TempDir()
	unified := filepath.Join(hybrid, "unified")
	if err := os.Symlink(root, unified); err != nil {
		t.Fatal(err)
	}
	for _, configured := range []string{hybrid, unified} {
		if got, _, err := CgroupRoot(configured); err != nil || got != unified {
			t.Errorf("CgroupRoot(%s) = %s, %v, want %s", configured, got, err, unified)
		}
	}
}
