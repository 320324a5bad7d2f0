package install

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// Check looks at what is on the node now and lists what is not as c wants it. A Binary of ""
// is not compared.
func Check(c Config) []discovery.Problem {
	var found []discovery.Problem
	complain := func(where string, err error) {
		if err != nil {
			found = append(found, discovery.Problem{Where: where, Cause: err.Error()})
		}
	}
	binary := filepath.Join(c.BinDir, conf.PluginType)
	complain(binary, checkBinary(binary, c.Binary))
	complain(filepath.Join(c.StateDir, stateName), checkState(c.StateDir))
	where, err := checkActive(c)
	complain(where, err)
	return found
}

func checkBinary(path, like string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
		return fmt.Errorf("it is not a program: its mode is %v", info.Mode())
	}
	if like == "" {
		return nil
	}
	is, err := os.ReadFile(path)
	want, likeErr := os.ReadFile(like)
	if err := errors.Join(err, likeErr); err != nil {
		return err
	}
	if !bytes.Equal(is, want) {
		return errors.New("it is not the plugin of this agent: another version is installed, or somebody changed it")
	}
	return nil
}

func checkState(dir string) error {
	if _, err := ReadState(dir); err != nil {
		return err
	}
	info, err := os.Stat(filepath.Join(dir, stateName))
	if err == nil && info.Mode().Perm()&^stateMode != 0 {
		err = fmt.Errorf("it holds a token and others may read it: its mode is %v, not %v", info.Mode().Perm(), stateMode)
	}
	return err
}

func checkActive(c Config) (where string, err error) {
	name, err := active(c.ConfDir)
	if err != nil {
		return c.ConfDir, err
	}
	where = filepath.Join(c.ConfDir, name)
	if !isList(name) {
		return where, fmt.Errorf("it is the configuration that the container runtime uses, and %s is not in it", conf.PluginType)
	}
	text, err := readConf(where)
	if err != nil {
		return where, err
	}
	entries, err := conf.Find(text)
	switch {
	case err != nil:
		return where, fmt.Errorf("the container runtime cannot use it: %w", err)
	case len(entries) == 0:
		return where, fmt.Errorf("it is the configuration that the container runtime uses, and %s is not in it: pods that start now are captured only after they have started", conf.PluginType)
	case len(entries) > 1:
		return where, fmt.Errorf("%s is in it %d times", conf.PluginType, len(entries))
	case entries[0] != c.Entry:
		return where, fmt.Errorf("the entry of %s is %+v and should be %+v", conf.PluginType, entries[0], c.Entry)
	}
	return where, nil
}
