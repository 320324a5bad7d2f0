// Package admintest is an agent for tests: a Backend that answers what it is told to, and
// the admin server in front of it.
package admintest

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// Backend answers with its fields. The zero Backend knows nothing.
type Backend struct {
	WorkloadRows    []admin.Workload
	ServiceRows     []admin.Service
	PolicyRows      []admin.Policy
	CertificateRows []admin.Certificate
	ConnectionRows  []admin.Connection
	Findings        []admin.Finding
	Recent          []admin.Flow
	// Live is what a follower gets after the recent records.
	Live    <-chan admin.Flow
	Answer  func(admin.WhyQuery) (admin.Why, error)
	Running admin.Version
	// Err is what every method but the log level's returns, when set.
	Err error

	mu    sync.Mutex
	level slog.Level
}

var _ admin.Backend = (*Backend)(nil)

// Workloads implements admin.Backend, as do all that follow.
func (b *Backend) Workloads(context.Context) ([]admin.Workload, error) { return b.WorkloadRows, b.Err }

// Services lists ServiceRows.
func (b *Backend) Services(context.Context) ([]admin.Service, error) { return b.ServiceRows, b.Err }

// Policies lists PolicyRows.
func (b *Backend) Policies(context.Context) ([]admin.Policy, error) { return b.PolicyRows, b.Err }

// Certificates lists CertificateRows.
func (b *Backend) Certificates(context.Context) ([]admin.Certificate, error) {
	return b.CertificateRows, b.Err
}

// Connections lists ConnectionRows.
func (b *Backend) Connections(context.Context) ([]admin.Connection, error) {
	return b.ConnectionRows, b.Err
}

// Check lists Findings.
func (b *Backend) Check(context.Context) ([]admin.Finding, error) { return b.Findings, b.Err }

// Version is Running.
func (b *Backend) Version(context.Context) (admin.Version, error) { return b.Running, b.Err }

// Flows emits Recent, and then Live until ctx ends or Live is closed; Err ends it.
func (b *Backend) Flows(ctx context.Context, follow bool, emit func(admin.Flow) error) error {
	for _, f := range b.Recent {
		if err := emit(f); err != nil {
			return err
		}
	}
	for follow {
		select {
		case <-ctx.Done():
			return nil
		case f, ok := <-b.Live:
			if !ok {
				return b.Err
			}
			if err := emit(f); err != nil {
				return err
			}
		}
	}
	return b.Err
}

// Why asks Answer.
func (b *Backend) Why(_ context.Context, q admin.WhyQuery) (admin.Why, error) {
	if b.Answer == nil {
		return admin.Why{}, b.Err
	}
	return b.Answer(q)
}

// LogLevel is what SetLogLevel set, at first INFO.
func (b *Backend) LogLevel(context.Context) (slog.Level, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.level, nil
}

// SetLogLevel sets it.
func (b *Backend) SetLogLevel(_ context.Context, level slog.Level) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.level = level
	return nil
}

// Serve runs b's agent as node in dir until the test ends, or the returned func is called.
// The path of its socket is dir/node.sock.
func Serve(t testing.TB, dir, node string, b admin.Backend) (stop func()) {
	t.Helper()
	server, err := admin.New(admin.Config{Socket: filepath.Join(dir, node+".sock"), Backend: b, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the agent's API ended with: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}
