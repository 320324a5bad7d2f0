package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/raceway-mesh/raceway/dataplane"
)

// record is what must be known to release a pod, or to take it over, when the agent that
// enrolled it is gone. It is written before the deed that it speaks of: it may say too
// much, never too little.
type record struct {
	UID      string       `json:"uid"`
	NetNS    string       `json:"netns"`
	Cookie   uint64       `json:"cookie"`
	Addrs    []netip.Addr `json:"addrs"`
	Outbound bool         `json:"outbound"`
	Inbound  bool         `json:"inbound"`
	// UDP says that UDP is captured, and how: see UDPConfig. Without it UDPRequire is of a pod
	// whose UDP the guard drops, since it cannot be captured.
	UDP        bool                  `json:"udp,omitempty"`
	UDPStrict  bool                  `json:"udpStrict,omitempty"`
	UDPRequire bool                  `json:"udpRequire,omitempty"`
	UDPClear   []dataplane.PortRange `json:"udpClear,omitempty"`
	// UDPIfindexes are the pod's own interfaces, where programs for UDP are attached.
	UDPIfindexes []int `json:"udpIfindexes,omitempty"`
	// OutboundSince is when outbound capture was switched on, in nanoseconds since boot; 0
	// when it is off or an agent did it that did not note the time.
	OutboundSince int64 `json:"outboundSince,omitempty"`
	// HostIfindex is the guarded end of the pod's veth pair in the host's namespace; 0 when
	// the pod is not guarded and its older connections are not noted.
	HostIfindex int `json:"hostIfindex,omitempty"`
	// MoreIfindexes are those of further veth pairs.
	MoreIfindexes []int `json:"moreIfindexes,omitempty"`
	// Ifindex is the pod's own interface, when TC redirects inbound connections there.
	Ifindex int `json:"ifindex,omitempty"`
	// Qdiscs lists the attachment points that got their clsact qdisc from us.
	Qdiscs []string `json:"qdiscs,omitempty"`
	// Sysctls holds the values that were there before, by path below /proc/sys.
	Sysctls map[string]string `json:"sysctls,omitempty"`
}

// judgesUDP tells whether the programs look at the pod's UDP.
func (r *record) judgesUDP() bool { return r.UDP || r.UDPRequire }

// ledger keeps the records in files.
type ledger struct{ dir string }

func (l ledger) path(r *record) string {
	return filepath.Join(l.dir, cookieName(r.Cookie)+".json")
}

func cookieName(cookie uint64) string { return strconv.FormatUint(cookie, 10) }

func (l ledger) load() (map[string]*record, error) {
	records := make(map[string]*record)
	paths, err := filepath.Glob(filepath.Join(l.dir, "*.json"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		r, err := readRecord(path)
		if err != nil {
			return nil, err
		}
		records[r.UID] = r
	}
	return records, nil
}

func readRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("pod record %s (delete it to forget the pod): %w", path, err)
	}
	return r, nil
}

// save replaces the record's file in one step.
func (l ledger) save(r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := l.path(r)
	fresh := path + ".new"
	if err := os.WriteFile(fresh, data, 0o600); err != nil {
		return fmt.Errorf("record pod %s: %w", r.UID, err)
	}
	if err := os.Rename(fresh, path); err != nil {
		return fmt.Errorf("record pod %s: %w", r.UID, err)
	}
	return nil
}

func (l ledger) forget(r *record) error {
	if err := os.Remove(l.path(r)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget pod %s: %w", r.UID, err)
	}
	return nil
}
