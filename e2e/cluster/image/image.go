// Package image writes container images for tests, without a registry or an engine: one
// layer of files of this machine, in a tar that `ctr images import` takes.
package image

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Spec says what is in an image.
type Spec struct {
	Ref        string            // with a registry's host, which need not exist, and a tag
	Files      map[string]string // absolute path in the image: file of this machine, links followed
	Links      map[string]string // absolute path in the image: where it points
	Text       map[string]string // absolute path in the image: content
	Dirs       []string          // that are empty and that everybody may write to
	Entrypoint []string
	Env        []string
	User       string // uid:gid; "" is root
}

// Write writes the image's tar to file.
func Write(file string, s Spec) error {
	tag, err := name.NewTag(s.Ref, name.StrictValidation)
	if err != nil {
		return fmt.Errorf("write an image: %w", err)
	}
	layer, err := tarball.LayerFromOpener(s.open, tarball.WithCompressionLevel(gzip.NoCompression))
	if err != nil {
		return fmt.Errorf("write image %s: %w", s.Ref, err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return fmt.Errorf("write image %s: %w", s.Ref, err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("write image %s: %w", s.Ref, err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config = v1.Config{Entrypoint: s.Entrypoint, Env: append([]string{"PATH=/bin:/usr/bin:/usr/sbin"}, s.Env...), User: s.User}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return fmt.Errorf("write image %s: %w", s.Ref, err)
	}
	if err := tarball.WriteToFile(file, tag, img); err != nil {
		return fmt.Errorf("write image %s: %w", s.Ref, err)
	}
	return nil
}

// open streams the layer. It is called several times, and gives the same each time.
func (s Spec) open() (io.ReadCloser, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(s.write(w)) }()
	return r, nil
}

func (s Spec) write(w io.Writer) error {
	layer := tar.NewWriter(w)
	for _, dir := range s.directories() {
		mode := int64(0o755)
		if slices.Contains(s.Dirs, dir) {
			mode = 0o1777
		}
		if err := layer.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(dir, "/") + "/", Mode: mode}); err != nil {
			return err
		}
	}
	for _, target := range slices.Sorted(maps.Keys(s.Files)) {
		if err := addFile(layer, target, s.Files[target]); err != nil {
			return err
		}
	}
	for _, target := range slices.Sorted(maps.Keys(s.Links)) {
		header := &tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(target, "/"), Linkname: s.Links[target], Mode: 0o777}
		if err := layer.WriteHeader(header); err != nil {
			return err
		}
	}
	for _, target := range slices.Sorted(maps.Keys(s.Text)) {
		header := &tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(target, "/"), Mode: 0o644, Size: int64(len(s.Text[target]))}
		if err := layer.WriteHeader(header); err != nil {
			return err
		}
		if _, err := io.WriteString(layer, s.Text[target]); err != nil {
			return err
		}
	}
	return layer.Close()
}

// directories lists all that there are, parents first.
func (s Spec) directories() []string {
	found := make(map[string]bool)
	add := func(dir string) {
		for ; dir != "/" && dir != "."; dir = path.Dir(dir) {
			found[dir] = true
		}
	}
	for _, dir := range s.Dirs {
		add(dir)
	}
	for _, files := range []map[string]string{s.Files, s.Links, s.Text} {
		for target := range files {
			add(path.Dir(target))
		}
	}
	return slices.Sorted(maps.Keys(found))
}

func addFile(layer *tar.Writer, target, source string) (err error) {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(target, "/"), Mode: int64(info.Mode().Perm()), Size: info.Size()}
	if err := layer.WriteHeader(header); err != nil {
		return err
	}
	_, err = io.Copy(layer, f)
	return err
}
