// Package conf edits CNI network configuration lists (conflists): it puts the entry of
// Raceway's plugin at the end of a list and takes it out again. It cuts and pastes in the
// text and leaves every other byte alone, so that order, unknown fields and layout stay, and
// taking out is the exact inverse of putting in.
package conf

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// PluginType is the type of Raceway's plugin, and the name of its binary.
const PluginType = "raceway-cni"

// Entry is the plugin's own configuration in a list.
type Entry struct {
	// StateDir is where the plugin finds its state, Socket where it finds the agent.
	StateDir string `json:"stateDir"`
	Socket   string `json:"socket"`
	// Namespace is the agent's own: its pods are never held up. It is here and not in the
	// state, because an agent must be able to start on a node whose state was lost.
	Namespace string `json:"namespace"`
}

// typedEntry is an Entry as it stands in the list.
type typedEntry struct {
	Type string `json:"type"`
	Entry
}

// span is the place of an element in the text.
type span struct{ start, end int }

// list is what is known of a conflist's text.
type list struct {
	open    int // just behind the [ of plugins
	plugins []span
	types   []string
}

// Insert returns text with e at the end of its plugins, and text itself when e is there
// already. An entry that differs from e is replaced.
func Insert(text []byte, e Entry) ([]byte, error) {
	if found, err := Find(text); err != nil || (len(found) == 1 && found[0] == e) {
		return text, err
	}
	text, _, err := Remove(text)
	if err != nil {
		return nil, err
	}
	l, err := parse(text)
	if err != nil {
		return nil, err
	}
	if len(l.plugins) == 0 {
		return nil, errors.New("it lists no plugin for Raceway's to follow")
	}
	entry, err := json.Marshal(typedEntry{PluginType, e})
	if err != nil {
		return nil, fmt.Errorf("write the entry: %w", err)
	}
	last := l.plugins[len(l.plugins)-1]
	added := slices.Concat([]byte(","), l.gap(text), entry)
	return slices.Concat(text[:last.end], added, text[last.end:]), nil
}

// gap is the white space before the last plugin.
func (l *list) gap(text []byte) []byte {
	start := l.plugins[len(l.plugins)-1].start
	trimmed := bytes.TrimRight(text[:start], " \t\r\n")
	return text[len(trimmed):start]
}

// Remove returns text without any entry of Raceway's plugin, and whether there was one.
func Remove(text []byte) (rest []byte, found bool, err error) {
	for {
		l, err := parse(text)
		if err != nil {
			return nil, false, err
		}
		i := slices.Index(l.types, PluginType)
		if i < 0 {
			return text, found, nil
		}
		found = true
		start, end := l.plugins[i].start, l.plugins[i].end
		switch {
		case i > 0:
			start = l.plugins[i-1].end // with the comma before it
		case len(l.plugins) > 1:
			end = l.plugins[1].start // with the comma behind it
		default:
			start = l.open
		}
		text = slices.Concat(text[:start], text[end:])
	}
}

// Find returns the entries of Raceway's plugin.
func Find(text []byte) ([]Entry, error) {
	l, err := parse(text)
	if err != nil {
		return nil, err
	}
	var found []Entry
	for i, p := range l.plugins {
		if l.types[i] != PluginType {
			continue
		}
		var e typedEntry
		if err := json.Unmarshal(text[p.start:p.end], &e); err != nil {
			return nil, fmt.Errorf("read the entry of %s: %w", PluginType, err)
		}
		found = append(found, e.Entry)
	}
	return found, nil
}

// Has reports whether one of the plugins is of that type.
func Has(text []byte, pluginType string) bool {
	l, err := parse(text)
	return err == nil && slices.Contains(l.types, pluginType)
}

// Wrap makes a list of the configuration of a single plugin, as the container runtime does.
func Wrap(text []byte) ([]byte, error) {
	var single struct {
		Name       string          `json:"name"`
		CNIVersion string          `json:"cniVersion"`
		Type       string          `json:"type"`
		Plugins    json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(text, &single); err != nil {
		return nil, fmt.Errorf("it is not the JSON of a plugin's configuration: %w", err)
	}
	if single.Plugins != nil {
		return nil, errors.New("it is a list in a file for a single plugin, which no runtime reads: its name must end in .conflist")
	}
	if single.Type == "" {
		return nil, errors.New("it names no type of plugin")
	}
	var out bytes.Buffer
	out.WriteString("{\n")
	for _, field := range []struct{ name, value string }{{"cniVersion", single.CNIVersion}, {"name", single.Name}} {
		if field.value == "" {
			continue
		}
		value, err := json.Marshal(field.value)
		if err != nil {
			return nil, fmt.Errorf("write %s: %w", field.name, err)
		}
		fmt.Fprintf(&out, "  %q: %s,\n", field.name, value)
	}
	fmt.Fprintf(&out, "  \"plugins\": [\n    %s\n  ]\n}\n", bytes.TrimSpace(text))
	return out.Bytes(), nil
}

// parse finds the plugins of a list. Of two fields named plugins the last counts, as for
// everyone who reads the list.
func parse(text []byte) (*list, error) {
	var whole map[string]json.RawMessage
	if err := json.Unmarshal(text, &whole); err != nil {
		return nil, fmt.Errorf("it is not the JSON of a list of plugins: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	if _, err := d.Token(); err != nil { // the {
		return nil, fmt.Errorf("read the list: %w", err)
	}
	var l *list
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("read the list: %w", err)
		}
		if name == "plugins" {
			l, err = parsePlugins(d, text)
		} else {
			err = d.Decode(new(json.RawMessage))
		}
		if err != nil {
			return nil, err
		}
	}
	if l == nil {
		return nil, errors.New("it has no field \"plugins\"")
	}
	return l, nil
}

func parsePlugins(d *json.Decoder, text []byte) (*list, error) {
	if open, err := d.Token(); err != nil || open != json.Delim('[') {
		return nil, errors.Join(errors.New("its field \"plugins\" is not a list"), err)
	}
	l := &list{open: int(d.InputOffset())}
	for d.More() {
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return nil, fmt.Errorf("read the plugins: %w", err)
		}
		end := int(d.InputOffset())
		start := end - len(raw)
		var plugin struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(raw, &plugin); err != nil || !bytes.Equal(text[start:end], raw) {
			return nil, errors.Join(fmt.Errorf("its plugin %d is not a JSON object", len(l.plugins)), err)
		}
		l.plugins = append(l.plugins, span{start, end})
		l.types = append(l.types, plugin.Type)
	}
	if _, err := d.Token(); err != nil { // the ]
		return nil, fmt.Errorf("read the plugins: %w", err)
	}
	return l, nil
}
