package lab_test

import (
	"crypto/rand"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Others clean up at any time, also between the directory's making and its first content.
func TestALabIsNotTakenForDeadWhileItIsMade(t *testing.T) {
	netnstest.Require(t)
	name := "rw" + strings.ToLower(rand.Text()[:5])
	dir := lab.DirOf(name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := lab.Remove(name); err != nil {
			t.Error(err)
		}
	})
	running := func() bool {
		t.Helper()
		known, err := lab.Known()
		if err != nil {
			t.Fatal(err)
		}
		alive, found := known[name]
		if !found {
			t.Fatal("it is not known")
		}
		return alive
	}
	if !running() {
		t.Error("a lab that is just being made counts as dead")
	}
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(dir, past, past); err != nil {
		t.Fatal(err)
	}
	if running() {
		t.Error("what somebody left behind counts as alive")
	}
}
