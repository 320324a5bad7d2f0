package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
)

// Names of what a single plugin's configuration becomes. The list sorts right behind the
// original, so that it is the first when the original is put aside; and what is put aside has
// a name that no container runtime reads.
//
//	10-net.conf  →  10-net.conf.conflist + 10-net.conf.raceway-saved
const (
	listSuffix  = ".conflist"
	savedSuffix = ".raceway-saved"
	// ciliumSuffix is what Cilium appends to the configuration of others.
	ciliumSuffix = ".cilium_bak"
)

// errNoConf says that there is no network configuration.
var errNoConf = errors.New("no network plugin has written its configuration yet")

// active is the configuration that a container runtime uses: the first by name, also when it
// cannot be read.
func active(dir string) (name string, err error) {
	names, err := confNames(dir)
	if err != nil {
		return "", err
	}
	if len(names) == 0 {
		return "", errNoConf
	}
	return names[0], nil
}

// confNames are the names that libcni reads, in its order.
func confNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil {
		return nil, fmt.Errorf("read the directory of the network configuration: %w", err)
	}
	var names []string
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conf", listSuffix, ".json":
			if !e.IsDir() {
				names = append(names, e.Name())
			}
		}
	}
	return names, nil
}

// readConf is os.ReadFile with words for a link that leads out of what is mounted.
func readConf(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if info, lerr := os.Lstat(path); errors.Is(err, fs.ErrNotExist) && lerr == nil && info.Mode().Type() == fs.ModeSymlink {
		return nil, fmt.Errorf("it is a link to a file that is not visible in the agent's container; make it a file, or mount where it leads: %w", err)
	}
	return text, err
}

// isList reports whether the file holds a list of plugins, by its name as the runtimes do.
func isList(name string) bool { return filepath.Ext(name) == listSuffix }

// insert puts e into the active configuration called name, and reports whether it had to.
// With exact false, any entry of ours will do: it may be another version's.
func insert(dir, name string, e conf.Entry, exact bool) (done bool, err error) {
	path := filepath.Join(dir, name)
	text, err := readConf(path)
	if err != nil {
		return false, err
	}
	if !isList(name) {
		return true, wrap(path, text, e)
	}
	found, err := conf.Find(text)
	if err != nil {
		return false, err
	}
	if len(found) > 0 && !exact {
		return false, nil
	}
	edited, err := conf.Insert(text, e)
	if err != nil || len(found) == 1 && found[0] == e {
		return false, err
	}
	return true, replace(path, text, edited)
}

// wrap makes a list of a single plugin's configuration and puts the original aside: first the
// list, which stands behind the original, so that there is a network at any moment.
func wrap(path string, text []byte, e conf.Entry) error {
	wrapped, err := conf.Wrap(text)
	if err != nil {
		return err
	}
	wrapped, err = conf.Insert(wrapped, e)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if err := put(path+listSuffix, wrapped, info.Mode().Perm(), info); err != nil {
		return err
	}
	if err := os.Rename(path, path+savedSuffix); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// ciliumAtWork reports whether Cilium keeps dir for itself.
func ciliumAtWork(dir, name string) bool {
	if text, err := os.ReadFile(filepath.Join(dir, name)); err == nil && conf.Has(text, "cilium-cni") {
		return true
	}
	entries, err := os.ReadDir(dir)
	return err == nil && slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return strings.HasSuffix(e.Name(), ciliumSuffix) })
}
