package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
)

// fakeInstallation notes what becomes of it.
type fakeInstallation struct {
	state     kube.Released
	err       error
	forgotten []string
	removed   bool
}

func (f *fakeInstallation) Release(_ context.Context, progress func(done, of int)) (kube.Released, error) {
	progress(len(f.state.Done), len(f.state.Done)+len(f.state.Silent))
	return f.state, f.err
}

func (f *fakeInstallation) ForgetCapture(_ context.Context, nodes []string) error {
	f.forgotten = nodes
	return nil
}

func (f *fakeInstallation) Remove(context.Context) ([]string, error) {
	f.removed = true
	return []string{"daemonsets/raceway-agent"}, nil
}

func TestUninstall(t *testing.T) {
	silent := map[string]string{"n3": "CrashLoopBackOff"}
	for _, test := range []struct {
		name      string
		uninstall uninstall
		state     kube.Released
		err       error
		code      int
		removed   bool
		forgotten []string
		says      string
	}{
		{name: "all answer", state: kube.Released{Done: []string{"n1", "n2"}}, removed: true, says: "deleted daemonsets/raceway-agent"},
		{name: "for helm", uninstall: uninstall{releaseOnly: true}, state: kube.Released{Done: []string{"n1"}}, says: "1 of 1 agents"},
		{name: "a node is off", state: kube.Released{Done: []string{"n1"}, Off: []string{"n2"}}, removed: true, forgotten: []string{"n2"}, says: "not ready, and could not answer: n2"},
		{name: "an agent is silent", state: kube.Released{Done: []string{"n1"}, Silent: silent}, code: exitFound, says: "node n3 did not answer: CrashLoopBackOff"},
		{name: "and no matter", uninstall: uninstall{force: true}, state: kube.Released{Silent: silent}, code: exitFound, removed: true, forgotten: []string{"n3"}, says: "node n3 did not answer"},
		{name: "no cluster", err: errors.New("connection refused"), code: exitAgent, says: "connection refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			term := newTerminal(t.TempDir())
			installation := &fakeInstallation{state: test.state, err: test.err}
			test.uninstall.timeout = time.Minute
			err := test.uninstall.run(t.Context(), term.cli, installation)
			code, said := exitOK, term.stdout.String()
			if err != nil {
				code, said = exitCode(err), said+err.Error()
			}
			if code != test.code || installation.removed != test.removed || !slices.Equal(installation.forgotten, test.forgotten) {
				t.Errorf("code %d, removed %t, forgotten %q, want %d, %t, %q", code, installation.removed, installation.forgotten, test.code, test.removed, test.forgotten)
			}
			if !strings.Contains(said, test.says) {
				t.Errorf("said %q, want %q in it", said, test.says)
			}
		})
	}
}
