package filewatch_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/certs/filewatch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// watched runs a watch of path; the channel gets the file's text at every call.
func watched(t *testing.T, path, file string) <-chan string {
	t.Helper()
	w, err := filewatch.New(path)
	must(t, err)
	told := make(chan string, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func() {
			text, err := os.ReadFile(file)
			if err != nil {
				text = []byte("none")
			}
			told <- string(text)
		})
	}()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
		must(t, w.Close())
		must(t, w.Close()) // again
	})
	return told
}

func expect(t *testing.T, told <-chan string, want string) {
	t.Helper()
	for deadline := time.After(20 * time.Second); ; {
		select {
		case got := <-told:
			if got == want {
				return
			}
		case <-deadline:
			t.Fatalf("%q was not told", want)
		}
	}
}

func TestTellsHoweverAFileIsReplaced(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	must(t, os.WriteFile(name, []byte("0"), 0o600))
	told := watched(t, name, name)
	must(t, os.WriteFile(name, []byte("1"), 0o600))
	expect(t, told, "1")
	must(t, os.WriteFile(name+".tmp", []byte("2"), 0o600))
	must(t, os.Rename(name+".tmp", name))
	expect(t, told, "2")
	must(t, os.Remove(name))
	expect(t, told, "none")
	must(t, os.WriteFile(name, []byte("3"), 0o600))
	expect(t, told, "3")
}

func TestTellsOfTheSymlinkThatKubernetesSwaps(t *testing.T) {
	dir := t.TempDir()
	publish := func(generation, text string) {
		must(t, os.Mkdir(filepath.Join(dir, generation), 0o700))
		must(t, os.WriteFile(filepath.Join(dir, generation, "file"), []byte(text), 0o600))
		must(t, os.Symlink(generation, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	publish("..1", "1")
	name := filepath.Join(dir, "file")
	must(t, os.Symlink(filepath.Join("..data", "file"), name))
	told := watched(t, name, name)
	publish("..2", "2")
	expect(t, told, "2")
}

func TestTellsOfFilesInADirectory(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	told := watched(t, dir, name)
	must(t, os.WriteFile(name, []byte("1"), 0o600))
	expect(t, told, "1")
}

func TestTellsEvenIfTheDirectoryIsNeverQuiet(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	told := watched(t, dir, name)
	must(t, os.WriteFile(name, []byte("1"), 0o600))
	deadline := time.Now().Add(20 * time.Second)
	for {
		must(t, os.WriteFile(filepath.Join(dir, "noise"), []byte{0}, 0o600))
		select {
		case <-told:
			return
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the noise kept the change from being told")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestMissingPathIsAnError(t *testing.T) {
	if _, err := filewatch.New(filepath.Join(t.TempDir(), "gone")); err == nil {
		t.Error("watches what is not there")
	}
}
