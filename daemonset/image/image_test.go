package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

const tag = "ghcr.io/raceway-mesh/raceway:test"

// build makes a directory of programs that do nothing.
func build(t *testing.T, cgo string) string {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	code := "package main\n\nfunc main() {}\n"
	if cgo == "1" {
		code = "package main\n\nimport \"C\"\n\nfunc main() {}\n"
	}
	if err := os.WriteFile(source, []byte(code), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, programs[0]), source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, program := range programs[1:] {
		if err := os.Link(filepath.Join(dir, programs[0]), filepath.Join(dir, program)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func image(t *testing.T, bin string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b, options{bin: bin, arch: runtime.GOARCH, tag: tag, version: "v1"}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack writes a tar file's files into a directory.
func unpack(t *testing.T, archive []byte) string {
	t.Helper()
	dir := t.TempDir()
	for in := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, header.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestImageIsOneOCILayoutThatContainerdAndDockerRead(t *testing.T) {
	bin := build(t, "0")
	archive := image(t, bin)
	dir := unpack(t, archive)
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 {
		t.Fatalf("%d images", len(manifest.Manifests))
	}
	descriptor := manifest.Manifests[0]
	if descriptor.Annotations["io.containerd.image.name"] != tag {
		t.Errorf("containerd would call it %q", descriptor.Annotations["io.containerd.image.name"])
	}
	if !descriptor.Platform.Equals(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}) {
		t.Errorf("platform %v", descriptor.Platform)
	}
	img, err := index.Image(descriptor.Digest)
	if err != nil {
		t.Fatal(err)
	}
	checkBlobs(t, filepath.Join(dir, "blobs/sha256"))
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Config.User != "65532:65532" || config.Architecture != runtime.GOARCH || config.OS != "linux" {
		t.Errorf("config %+v", config)
	}

	name := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(name, archive, 0o600); err != nil {
		t.Fatal(err)
	}
	docker, err := tarball.ImageFromPath(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := docker.ConfigName(); err != nil || got != must(t, img.ConfigName) {
		t.Errorf("docker sees the image %v: %v", got, err)
	}
	manifests, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var entries tarball.Manifest
	if err := json.Unmarshal(manifests, &entries); err != nil || len(entries) != 1 || !slices.Equal(entries[0].RepoTags, []string{tag}) {
		t.Errorf("docker's manifest %s: %v", manifests, err)
	}

	checkRootFS(t, img)
	if !bytes.Equal(archive, image(t, bin)) {
		t.Error("the same programs gave another image")
	}
}

func must[T any](t *testing.T, f func() (T, error)) T {
	t.Helper()
	v, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// checkBlobs holds the blobs to their names: image manifest, config, layer.
func checkBlobs(t *testing.T, dir string) {
	t.Helper()
	blobs, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(blobs) != 3 {
		t.Errorf("%d blobs", len(blobs))
	}
	for _, blob := range blobs {
		data, err := os.ReadFile(filepath.Join(dir, blob.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != blob.Name() {
			t.Errorf("blob %s has the hash %x", blob.Name(), sum)
		}
	}
}

// checkRootFS looks at what a container would see.
func checkRootFS(t *testing.T, img v1.Image) {
	t.Helper()
	rootfs := mutate.Extract(img)
	defer rootfs.Close()
	seen := map[string]*tar.Header{}
	content := map[string]string{}
	for in := tar.NewReader(rootfs); ; {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Uid != 0 || header.Gid != 0 || !header.ModTime.Equal(epoch) {
			t.Errorf("%s: %+v", header.Name, header)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(header.Name, "/")
		seen[name], content[name] = header, string(data)
	}
	for _, program := range programs {
		if h := seen["usr/local/bin/"+program]; h == nil || h.Mode != 0o755 || h.Size == 0 {
			t.Errorf("%s: %+v", program, h)
		}
	}
	if h := seen["var/run"]; h == nil || h.Linkname != "../run" {
		t.Errorf("/var/run: %+v", h)
	}
	if h := seen["tmp"]; h == nil || h.Mode != 0o1777 {
		t.Errorf("/tmp: %+v", h)
	}
	if !strings.Contains(content["etc/passwd"], "nonroot:x:65532:65532:") {
		t.Errorf("/etc/passwd: %q", content["etc/passwd"])
	}
	for name := range seen {
		if strings.HasPrefix(name, "etc/ssl") {
			t.Errorf("%s: roots that nobody chose", name)
		}
	}
}

func TestProgramsThatWouldNotRunAreRefused(t *testing.T) {
	static := build(t, "0")
	other := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	for _, tt := range []struct {
		name, bin, arch, text string
	}{
		{"another architecture", static, other, "not for " + other},
		{"unknown architecture", static, "vax", "vax"},
		{"no programs", t.TempDir(), runtime.GOARCH, programs[0]},
		{"dynamic", build(t, "1"), runtime.GOARCH, "CGO_ENABLED=0"},
	} {
		if err := writeRootFS(io.Discard, tt.bin, tt.arch); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestImageWithoutRegistryIsRefused(t *testing.T) {
	cmd := command()
	output := filepath.Join(t.TempDir(), "image.tar")
	cmd.SetArgs([]string{"--bin", t.TempDir(), "--tag", "raceway:test", "-o", output})
	if err := cmd.Execute(); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(output); err == nil {
		t.Error("a file was written all the same")
	}
}

func TestDockerfileMakesTheSame(t *testing.T) {
	dockerfile, err := os.ReadFile("../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	quoted := func(s string) string { return "'" + strings.ReplaceAll(s, "\n", `\n`) + "'" }
	for _, want := range []string{
		quoted(passwd) + " >/rootfs/etc/passwd", quoted(group) + " >/rootfs/etc/group",
		"ln -s ../run /rootfs/var/run", "chmod 1777 /rootfs/tmp", "OUT=/rootfs/usr/local/bin",
		"USER 65532:65532", "ENV PATH=/usr/local/bin", `ENTRYPOINT ["/usr/local/bin/raceway"]`, "FROM scratch",
	} {
		if !strings.Contains(string(dockerfile), want) {
			t.Errorf("there is no %s", want)
		}
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range programs {
		if !strings.Contains(string(makefile), "/"+program) {
			t.Errorf("make programs does not make %s", program)
		}
	}
}
