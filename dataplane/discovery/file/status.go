package file

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

const statusExtension = ".json"

// status is the content of a node's status file.
type status struct {
	Node string `json:"node"`
	// Captured holds the UIDs of the node's pods that take tunnels. Those of another node's
	// pods count for nothing.
	Captured []string `json:"captured"`
	// UDP holds those of them that take UDP as well.
	UDP     []string  `json:"udp,omitempty"`
	Updated time.Time `json:"updated"`
}

// parseStatus reads a status file, which is named after its node. Fields that a later
// version adds do not matter.
func parseStatus(name string, data []byte) (status, []fault) {
	var s status
	decoder := json.NewDecoder(bytes.NewReader(data))
	if err := decoder.Decode(&s); err != nil {
		return status{}, []fault{{lineAt(data, offsetOf(err, int64(len(data)))), "not a status file: " + oneLine(err.Error())}}
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return status{}, []fault{{lineAt(data, decoder.InputOffset()), "not a status file: something follows its object"}}
	}
	if node := strings.TrimSuffix(name, statusExtension); s.Node != node {
		return status{}, []fault{{1, oneLine(fmt.Sprintf("status of node %q in the file of node %q", s.Node, node))}}
	}
	return s, nil
}

// offsetOf tells where an error is; one without a place is about the end.
func offsetOf(err error, end int64) int64 {
	var syntax *json.SyntaxError
	var mismatch *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return syntax.Offset
	case errors.As(err, &mismatch):
		return mismatch.Offset
	default:
		return end
	}
}

func lineAt(data []byte, offset int64) int {
	offset = max(0, min(offset, int64(len(data))))
	return bytes.Count(data[:offset], []byte("\n")) + 1
}

// Publisher writes the status file of one node: the only one that its agent may write.
type Publisher struct {
	dir, node string
}

var _ discovery.Publisher = (*Publisher)(nil)

// NewPublisher makes the directory if it is not there yet.
func NewPublisher(statusDir, node string) (*Publisher, error) {
	if complaints := validation.IsDNS1123Subdomain(node); len(complaints) > 0 {
		return nil, fmt.Errorf("node %q: %s", node, complaints[0])
	}
	if err := os.MkdirAll(statusDir, 0o755); err != nil {
		return nil, fmt.Errorf("make the status directory: %w", err)
	}
	return &Publisher{dir: statusDir, node: node}, nil
}

// PublishCaptured tells the agents of all nodes that exactly the pods with these UIDs take
// tunnels, and those of udp UDP as well. A reader sees the old list or the new one, never a part. The file need not
// outlive a crash of the machine, as the pods do not.
func (p *Publisher) PublishCaptured(_ context.Context, uids, udp []string) error {
	s := status{Node: p.node, Captured: sortedSet(uids), UDP: sortedSet(udp), Updated: time.Now().UTC()}
	if s.Captured == nil {
		s.Captured = []string{}
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("publish captured pods: %w", err)
	}
	// One writer per node: a temporary file that an agent left when it was killed is
	// overwritten by the next. Its name is hidden, so nobody reads it.
	temporary := filepath.Join(p.dir, "."+p.node+statusExtension+".tmp")
	if err := os.WriteFile(temporary, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("publish captured pods: %w", err)
	}
	if err := os.Rename(temporary, filepath.Join(p.dir, p.node+statusExtension)); err != nil {
		return fmt.Errorf("publish captured pods: %w", errors.Join(err, os.Remove(temporary)))
	}
	return nil
}

func sortedSet(uids []string) []string { return slices.Compact(slices.Sorted(slices.Values(uids))) }
