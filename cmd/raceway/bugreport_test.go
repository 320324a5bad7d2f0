package main

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

func untar(t *testing.T, path string) map[string]string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unzipped, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for r := tar.NewReader(unzipped); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[strings.TrimPrefix(header.Name, "raceway-bug-report/")] = string(data)
	}
}

func TestBugReportHasWhatAgentsAnswer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.tar.gz")
	code, stdout, stderr := raceway(t, twoNodes(t), "bug-report", "--file", path)
	if code != exitOK || !strings.Contains(stdout, path) {
		t.Fatalf("code %d: %s%s", code, stdout, stderr)
	}
	files := untar(t, path)
	for name, want := range map[string]string{
		"agents/n1/version.json":      "6.18.0",
		"agents/n1/check.json":        "shop/web-7d4b9c",
		"agents/n1/certificates.json": "7be0c1",
		"agents/n1/flows.json":        "deny-old",
		"agents/n2/connections.json":  "n2-1",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s is %q, want %q in it", name, files[name], want)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: others can read it", info.Mode(), err)
	}
	if code, _, stderr := raceway(t, twoNodes(t), "bug-report", "--file", path); code != exitUsage || !strings.Contains(stderr, "exists") {
		t.Errorf("over an existing file: code %d: %s", code, stderr)
	}
}

func TestBugReportSaysWhatItLacks(t *testing.T) {
	dir := t.TempDir()
	backend := nodeOne()
	backend.Err = errors.New("no view of the cluster yet")
	admintest.Serve(t, dir, "n1", backend)
	path := filepath.Join(t.TempDir(), "report.tar.gz")
	code, _, stderr := raceway(t, dir, "bug-report", "--file", path)
	if code != exitAgent || !strings.Contains(stderr, "no view of the cluster yet") {
		t.Errorf("code %d: %s", code, stderr)
	}
	if files := untar(t, path); !strings.Contains(files["errors.txt"], "no view of the cluster yet") {
		t.Errorf("errors.txt is %q", files["errors.txt"])
	}
}
