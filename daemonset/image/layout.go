package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// options say what image to write.
type options struct {
	bin     string // directory of the programs
	arch    string // as GOARCH
	tag     string
	version string
}

// write writes the image to w: a tar file of an OCI layout, and the manifest by which a
// docker without containerd's image store finds its way in it.
func write(w io.Writer, o options) (err error) {
	dir, err := os.MkdirTemp("", "raceway-image-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	rootfs := filepath.Join(dir, "rootfs.tar")
	if err := createRootFS(rootfs, o); err != nil {
		return err
	}
	img, err := newImage(rootfs, o)
	if err != nil {
		return err
	}
	path, err := layout.Write(filepath.Join(dir, "layout"), empty.Index)
	if err != nil {
		return err
	}
	// Names: the first is containerd's, the second the specification's.
	annotations := map[string]string{"io.containerd.image.name": o.tag, "org.opencontainers.image.ref.name": o.tag}
	platform := v1.Platform{OS: "linux", Architecture: o.arch}
	if err := path.AppendImage(img, layout.WithAnnotations(annotations), layout.WithPlatform(platform)); err != nil {
		return err
	}
	manifest, err := dockerManifest(img, o.tag)
	if err != nil {
		return err
	}
	if err := path.WriteFile("manifest.json", manifest, 0o644); err != nil {
		return err
	}
	return archive(w, string(path))
}

func createRootFS(path string, o options) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(writeRootFS(f, o.bin, o.arch), f.Close())
}

func newImage(rootfs string, o options) (v1.Image, error) {
	// What is saved by compressing harder is little, and takes ten times as long.
	layer, err := tarball.LayerFromFile(rootfs, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestSpeed))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", o.arch
	config.Created = v1.Time{Time: epoch}
	config.Config = v1.Config{
		Entrypoint: []string{"/usr/local/bin/raceway"},
		Env:        []string{"PATH=/usr/local/bin"},
		User:       "65532:65532",
		Labels: map[string]string{
			"org.opencontainers.image.title":    "Raceway",
			"org.opencontainers.image.source":   "https://github.com/raceway-mesh/raceway",
			"org.opencontainers.image.licenses": "Apache-2.0",
			"org.opencontainers.image.version":  o.version,
		},
	}
	return mutate.ConfigFile(img, config)
}

// dockerManifest is manifest.json as `docker save` writes it beside an OCI layout.
func dockerManifest(img v1.Image, tag string) ([]byte, error) {
	manifest, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	blob := func(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }
	entry := tarball.Descriptor{Config: blob(manifest.Config.Digest), RepoTags: []string{tag}}
	for _, layer := range manifest.Layers {
		entry.Layers = append(entry.Layers, blob(layer.Digest))
	}
	return json.Marshal(tarball.Manifest{entry})
}

// archive writes the files below dir to w, in the order of their names.
func archive(w io.Writer, dir string) error {
	out := tar.NewWriter(w)
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		return addFile(out, dir, path)
	})
	return errors.Join(err, out.Close())
}

func addFile(out *tar.Writer, dir, path string) (err error) {
	f, err := os.Open(filepath.Join(dir, path))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o644, Size: info.Size(), ModTime: epoch}); err != nil {
		return err
	}
	_, err = io.Copy(out, f)
	return err
}
