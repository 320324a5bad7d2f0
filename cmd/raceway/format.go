package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"k8s.io/apimachinery/pkg/util/duration"
	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// format is the value of --output.
type format string

const (
	formatTable format = "table"
	formatWide  format = "wide"
	formatJSON  format = "json"
	formatYAML  format = "yaml"
)

func formatNames() []string {
	return []string{string(formatTable), string(formatWide), string(formatJSON), string(formatYAML)}
}

// Set, String and Type make a format a flag's value.
func (f *format) Set(s string) error {
	for _, name := range formatNames() {
		if s == name {
			*f = format(s)
			return nil
		}
	}
	return fmt.Errorf("it is one of %s", strings.Join(formatNames(), ", "))
}

func (f *format) String() string { return string(*f) }

// Type implements pflag.Value.
func (f *format) Type() string { return "format" }

func (f *format) forPrograms() bool { return *f == formatJSON || *f == formatYAML }

// writeValue prints v for programs.
func (c *cli) writeValue(v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write as JSON: %w", err)
	}
	text = append(text, '\n')
	if c.flags.output == formatYAML {
		if text, err = yaml.JSONToYAML(text); err != nil {
			return fmt.Errorf("write as YAML: %w", err)
		}
	}
	_, err = c.out.Write(text)
	return err
}

// writeRecord prints one value of a stream: a line of JSON, or a YAML document.
func (c *cli) writeRecord(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write as JSON: %w", err)
	}
	if c.flags.output == formatYAML {
		if text, err = yaml.JSONToYAML(text); err != nil {
			return fmt.Errorf("write as YAML: %w", err)
		}
		_, err = io.WriteString(c.out, "---\n"+string(text))
		return err
	}
	_, err = c.out.Write(append(text, '\n'))
	return err
}

// MarshalJSON puts the agent first among the row's own fields.
func (t tagged[T]) MarshalJSON() ([]byte, error) {
	row, err := json.Marshal(t.row)
	if err != nil {
		return nil, err
	}
	name, err := json.Marshal(t.agent)
	if err != nil {
		return nil, err
	}
	return bytes.Join([][]byte{[]byte(`{"agent":`), name, []byte(","), row[1:]}, nil), nil
}

// age is how long ago t was, in kubectl's words.
func (c *cli) age(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return duration.HumanDuration(c.now().Sub(t))
}

// until is how long it is to t, or how long ago that was.
func (c *cli) until(t time.Time) string {
	switch left := t.Sub(c.now()); {
	case t.IsZero():
		return ""
	case left < 0:
		return duration.HumanDuration(-left) + " ago"
	default:
		return duration.HumanDuration(left)
	}
}

func size(n uint64) string { return strings.ReplaceAll(humanize.IBytes(n), " ", "") }

// principal is an identity as policies write it.
func principal(id spiffe.ID) string { return id.Principal() }

// first is the first address, and how many more there are.
func first(addrs []netip.Addr) string {
	switch len(addrs) {
	case 0:
		return ""
	case 1:
		return addrs[0].String()
	}
	return fmt.Sprintf("%s +%d", addrs[0], len(addrs)-1)
}

func addrPort(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func joinAddrs(addrs []netip.Addr) string {
	texts := make([]string, len(addrs))
	for i, a := range addrs {
		texts[i] = a.String()
	}
	return strings.Join(texts, ",")
}
