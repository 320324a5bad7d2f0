package istio

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"go.yaml.in/yaml/v2"

	"github.com/raceway-mesh/raceway/certs/filewatch"
)

// NodeTokens is an Authenticator that knows each node by a token, from a YAML file of
// `node: token` lines that is reloaded while it runs. What does not parse is logged, and the
// last good tokens stay in force.
type NodeTokens struct {
	path    string
	log     *slog.Logger
	watch   *filewatch.Watcher
	current atomic.Pointer[[]nodeToken]
}

type nodeToken struct {
	node string
	hash [sha256.Size]byte
}

// NewNodeTokens reads path, which others than its owner and group must not be able to read,
// and begins to watch it. Run follows it, Close releases it.
func NewNodeTokens(path string, log *slog.Logger) (*NodeTokens, error) {
	watch, err := filewatch.New(path)
	if err != nil {
		return nil, fmt.Errorf("node tokens: %w", err)
	}
	n := &NodeTokens{path: path, log: log, watch: watch}
	tokens, err := readTokens(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("node tokens: %w", err), watch.Close())
	}
	n.current.Store(&tokens)
	return n, nil
}

// Run reloads the tokens when they change, until ctx ends.
func (n *NodeTokens) Run(ctx context.Context) error {
	var lastErr string
	return n.watch.Run(ctx, func() {
		tokens, err := readTokens(n.path)
		if err != nil {
			if err.Error() != lastErr {
				n.log.Error("node tokens not reloaded, the last good ones stay in force", "error", err)
			}
			lastErr = err.Error()
			return
		}
		lastErr = ""
		if !slices.Equal(tokens, *n.current.Load()) {
			n.current.Store(&tokens)
			n.log.Info("node tokens reloaded", "nodes", len(tokens))
		}
	})
}

// Close ends the watch. It may be called again.
func (n *NodeTokens) Close() error { return n.watch.Close() }

// Authenticate implements Authenticator. Its time depends on the number of nodes alone.
func (n *NodeTokens) Authenticate(_ context.Context, token string) (Caller, error) {
	hash := sha256.Sum256([]byte(token))
	node := ""
	for _, t := range *n.current.Load() {
		if subtle.ConstantTimeCompare(hash[:], t.hash[:]) == 1 {
			node = t.node
		}
	}
	if node == "" {
		return Caller{}, &DeniedError{Reason: "the bearer token belongs to no node: compare the agent's token file with the CA's"}
	}
	return Caller{Node: node}, nil
}

// maxTokenFileBytes is room for some 50,000 nodes.
const maxTokenFileBytes = 8 << 20

func readTokens(path string) ([]nodeToken, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return nil, errors.Join(fmt.Errorf("everyone may use %s (mode %#o): chmod 600, and replace the tokens if they may have been read", path, mode), file.Close())
	}
	data, err := io.ReadAll(io.LimitReader(file, maxTokenFileBytes+1))
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	if len(data) > maxTokenFileBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxTokenFileBytes)
	}
	tokens, err := parseTokens(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return tokens, nil
}

// parseTokens never puts a token into an error.
func parseTokens(data []byte) ([]nodeToken, error) {
	var byNode map[string]string
	if err := yaml.UnmarshalStrict(data, &byNode); err != nil {
		// The parser's own text quotes what it stumbled over.
		return nil, errors.New("not a YAML mapping of node names to tokens, each once")
	}
	tokens := make([]nodeToken, 0, len(byNode))
	owner := map[[sha256.Size]byte]string{}
	for node, token := range byNode {
		if node == "" {
			return nil, errors.New("a token has no node")
		}
		if len(token) < minTokenLength {
			return nil, fmt.Errorf("token of node %s is shorter than %d characters: make one with `openssl rand -hex 32`", node, minTokenLength)
		}
		hash := sha256.Sum256([]byte(token))
		if other, taken := owner[hash]; taken {
			return nil, fmt.Errorf("nodes %s and %s have the same token", min(node, other), max(node, other))
		}
		owner[hash] = node
		tokens = append(tokens, nodeToken{node: node, hash: hash})
	}
	slices.SortFunc(tokens, func(a, b nodeToken) int { return strings.Compare(a.node, b.node) })
	return tokens, nil
}
