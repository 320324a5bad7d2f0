package main

import (
	"archive/tar"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// programs are what the image is for.
var programs = []string{"raceway", "raceway-agent", "raceway-ca", "raceway-cni"}

// The CA runs as nobody in particular, the agent as root: docs/install.md says why.
const (
	passwd = "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n"
	group  = "root:x:0:\nnonroot:x:65532:\n"
)

// epoch is when everything in the image was made, so that the same programs give the same
// image.
var epoch = time.Unix(0, 0).UTC()

// writeRootFS writes the image's only layer: static programs and what they expect of a
// root file system. There is no shell and no package manager, and no root certificates:
// Raceway trusts what it is given and nothing else.
func writeRootFS(w io.Writer, bin, arch string) error {
	layer := tar.NewWriter(w)
	for _, entry := range []struct {
		header tar.Header
		data   string
	}{
		{tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}, ""},
		{tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, group},
		{tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, passwd},
		{tar.Header{Typeflag: tar.TypeDir, Name: "run/", Mode: 0o755}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: "usr/", Mode: 0o755}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: "usr/local/", Mode: 0o755}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: "usr/local/bin/", Mode: 0o755}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: "var/", Mode: 0o755}, ""},
		// Nodes have it so, and paths of a node are opened from within the container.
		{tar.Header{Typeflag: tar.TypeSymlink, Name: "var/run", Linkname: "../run", Mode: 0o777}, ""},
	} {
		entry.header.Size = int64(len(entry.data))
		entry.header.ModTime = epoch
		if err := layer.WriteHeader(&entry.header); err != nil {
			return err
		}
		if _, err := io.WriteString(layer, entry.data); err != nil {
			return err
		}
	}
	for _, program := range programs {
		if err := addProgram(layer, filepath.Join(bin, program), arch); err != nil {
			return err
		}
	}
	return layer.Close()
}

func addProgram(layer *tar.Writer, path, arch string) (err error) {
	if err := checkStatic(path, arch); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	header := tar.Header{Typeflag: tar.TypeReg, Name: "usr/local/bin/" + filepath.Base(path), Mode: 0o755, Size: info.Size(), ModTime: epoch}
	if err := layer.WriteHeader(&header); err != nil {
		return err
	}
	_, err = io.Copy(layer, f)
	return err
}

// checkStatic complains of a program that would not run in the image: of another
// architecture, or one that needs a dynamic linker, which the image has not.
func checkStatic(path, arch string) (err error) {
	program, err := elf.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, program.Close()) }()
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	if want, ok := machine[arch]; !ok {
		return fmt.Errorf("unknown architecture %q", arch)
	} else if program.Machine != want {
		return fmt.Errorf("is for %s and not for %s", strings.TrimPrefix(program.Machine.String(), "EM_"), arch)
	}
	for _, segment := range program.Progs {
		if segment.Type == elf.PT_INTERP {
			return errors.New("is linked dynamically: build it with CGO_ENABLED=0")
		}
	}
	return nil
}
