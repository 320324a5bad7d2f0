package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
)

// sharedDir holds the maps that belong to no layout: an agent and its successor use the same,
// whatever else differs between their versions. Their pins are named by their shape.
//
//	listeners  the hooks of the new agent must find the listeners of the old one until each
//	           is replaced
//	own        the guard of the new agent must know the sockets that the old one still has
//	kubelet, probing, probes
//	           the kubelet's probes go on, whichever of the hooks noted them
//	clients, admitted
//	           likewise connections that go by the kernel alone
//	receivers, peers, flows, older_sockets
//	           likewise UDP; and what is captured must not be in clear while a new layout has
//	           no peers yet
//	quic_marks connections over QUIC go on in the agent that has them
const sharedDir = "shared"

func sharedMaps() []string {
	return []string{"listeners", "own", "kubelet", "probing", "probes", "clients", "admitted", "receivers", "peers", "flows", "older_sockets", "quic_marks"}
}

// shared makes the shared maps in dir, or opens them. The caller closes them.
func (l *loaded) shared(dir string) (_ map[string]*ebpf.Map, err error) {
	dir = filepath.Join(dir, sharedDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	opened := make(map[string]*ebpf.Map)
	defer func() {
		if err != nil {
			closeMaps(opened)
		}
	}()
	for _, name := range sharedMaps() {
		m, err := sharedMap(dir, l.spec.Maps[name])
		if err != nil {
			return nil, fmt.Errorf("shared map %s: %w", name, err)
		}
		opened[name] = m
	}
	return opened, nil
}

func sharedMap(dir string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	pin := filepath.Join(dir, shape(spec))
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	if m, err = ebpf.NewMap(spec); err != nil {
		return nil, err
	}
	if err := m.Pin(pin); err != nil {
		_ = m.Close() // a new map: nothing is lost
		return nil, err
	}
	return m, nil
}

// shape names a map by what its users must agree on.
func shape(spec *ebpf.MapSpec) string {
	return fmt.Sprintf("%s-%d-%d-%d-%d-%x", spec.Name, spec.Type, spec.KeySize, spec.ValueSize, spec.MaxEntries, spec.Flags)
}

// removeOtherShapes removes the shared maps of agents that had others.
func (l *loaded) removeOtherShapes(dir string) error {
	entries, err := os.ReadDir(filepath.Join(dir, sharedDir))
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		ours := slices.ContainsFunc(sharedMaps(), func(name string) bool { return e.Name() == shape(l.spec.Maps[name]) })
		if !ours {
			errs = append(errs, os.Remove(filepath.Join(dir, sharedDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// pinnedMaps are the maps that the next agent adopts, by where they are pinned.
func (l *loaded) pinnedMaps() map[string]*ebpf.Map {
	pinned := make(map[string]*ebpf.Map)
	for name, m := range l.coll.Maps {
		switch {
		case name == mapRodata:
		case slices.Contains(sharedMaps(), name):
			pinned[filepath.Join(l.dir, sharedDir, shape(l.spec.Maps[name]))] = m
		default:
			pinned[filepath.Join(l.hooks, name)] = m
		}
	}
	return pinned
}

func closeMaps(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		_ = m.Close() // a descriptor; the map is pinned, or in a collection
	}
}
