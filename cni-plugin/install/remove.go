package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
)

// Remove takes the plugin off the node: its entry from every configuration, also from those
// that were put aside, then its binary and state. It may be called again, and needs of c the
// directories alone; no Installer may run. It goes on after an error and joins them.
func Remove(c Config) error {
	err := withLock(c.ConfDir, func() error { return cleanConf(c.ConfDir) })
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // no configuration, no entry
	}
	if err != nil {
		// The binary and the state stay as long as an entry may need them.
		return err
	}
	return errors.Join(
		removeTemps(c.ConfDir), missingIsFine(removeTemps(c.BinDir)),
		missingIsFine(os.Remove(filepath.Join(c.BinDir, conf.PluginType))),
		missingIsFine(os.RemoveAll(c.StateDir))) // "" is nothing
}

func missingIsFine(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func cleanConf(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.IsDir() {
			continue
		}
		if err := cleanFile(path); err != nil {
			errs = append(errs, fmt.Errorf("take the entry of %s out of %s: %w", conf.PluginType, path, err))
		}
	}
	for _, e := range entries {
		if original, ok := strings.CutSuffix(e.Name(), savedSuffix); ok {
			errs = append(errs, restore(dir, original))
		}
	}
	return errors.Join(errs...)
}

// cleanFile takes the entry out of one file. Others' files that are no lists are theirs.
func cleanFile(path string) error {
	for {
		text, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(text, []byte(conf.PluginType)) {
			return missingIsFine(err) // as is a link that leads nowhere
		}
		rest, found, err := conf.Remove(text)
		if name := filepath.Base(path); err != nil && !isList(strings.TrimSuffix(name, ciliumSuffix)) {
			return nil
		}
		if err != nil || !found {
			return err
		}
		if err := replace(path, text, rest); !errors.Is(err, errChanged) {
			return err
		}
	}
}

// restore puts a single plugin's configuration back, unless somebody has changed the list that
// was made of it: then that list counts.
func restore(dir, original string) error {
	path := filepath.Join(dir, original)
	saved, list := path+savedSuffix, path+listSuffix
	text, err := os.ReadFile(saved)
	if err != nil {
		return err
	}
	now, err := os.ReadFile(list)
	if errors.Is(err, fs.ErrNotExist) {
		// Whoever removed the list has another configuration; if not, this is the only one.
		if _, err := active(dir); !errors.Is(err, errNoConf) {
			return errors.Join(err, os.Remove(saved))
		}
		return os.Rename(saved, path)
	}
	if err != nil {
		return err
	}
	if was, err := conf.Wrap(text); err != nil || !bytes.Equal(was, now) {
		return os.Remove(saved)
	}
	if _, err := os.Lstat(path); err == nil {
		// Its owner has written it again: it is the active one, and newer.
		return errors.Join(os.Remove(saved), os.Remove(list))
	}
	return errors.Join(os.Rename(saved, path), os.Remove(list))
}
