// Command image writes Raceway's container image as a tar file, with no container engine: an
// OCI layout that `ctr images import` and `kind load image-archive` take, and `docker load`
// as well. The same programs give the same file, byte for byte.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/spf13/cobra"
)

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var o options
	var output string
	cmd := &cobra.Command{
		Use:           "image",
		Short:         "Write Raceway's container image as a tar file",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error {
			// containerd takes the name as it stands: without a registry nothing would find it.
			if _, err := name.NewTag(o.tag, name.StrictValidation); err != nil {
				return err
			}
			return writeFile(output, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.bin, "bin", "bin", "directory of the programs, linked statically")
	f.StringVar(&o.arch, "arch", runtime.GOARCH, "architecture of the programs")
	f.StringVar(&o.tag, "tag", "", "name of the image, registry and tag included (required)")
	f.StringVar(&o.version, "version", "", "version of the programs, for the image's label")
	f.StringVarP(&output, "output", "o", "raceway-image.tar", "file to write")
	return cmd
}

// writeFile writes the image to path, whole or not at all.
func writeFile(path string, o options) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := errors.Join(write(f, o), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
