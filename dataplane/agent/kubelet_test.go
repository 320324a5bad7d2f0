package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/kubelet"
)

type fakeRecognizer struct {
	set     []kernel.Kubelet
	missing error
	err     error
}

func (f *fakeRecognizer) SetKubelet(k kernel.Kubelet) error {
	f.set = append(f.set, k)
	return f.err
}

func (f *fakeRecognizer) MissKubelet(cause error) { f.missing = cause }

func TestWhoTheKubeletIsIsSaid(t *testing.T) {
	for _, test := range []struct {
		name  string
		place kubelet.Place
		found error // by the search
		set   error // by the data plane
		want  string
	}{
		{"a process", kubelet.Place{Cgroup: 7, Path: "/kubelet", PID: 9, Others: 1}, nil, nil, "level=INFO"},
		{"a cgroup of its own", kubelet.Place{Cgroup: 7, Path: "/kubelet"}, nil, nil, "level=INFO"},
		{"a cgroup with others", kubelet.Place{Cgroup: 7, Path: "/all", Others: 1}, nil, nil, "every process of a cgroup counts as the kubelet"},
		{"none", kubelet.Place{}, errors.New("nobody"), nil, "may count as plaintext"},
		{"a kernel that cannot", kubelet.Place{Cgroup: 7, WithPods: true}, nil, errors.New("no helper"), "no helper"},
		{"after the mesh", kubelet.Place{Cgroup: 7}, nil, os.ErrClosed, ""},
	} {
		var out bytes.Buffer
		f := &fakeRecognizer{err: test.set}
		recognize(f, slog.New(slog.NewTextHandler(&out, nil)), test.place, test.found)
		if got := out.String(); !strings.Contains(got, test.want) || (test.want == "") != (got == "") {
			t.Errorf("%s: logged %q, want %q", test.name, got, test.want)
		}
		if !errors.Is(f.missing, test.found) {
			t.Errorf("%s: the data plane was told of %v", test.name, f.missing)
		}
		if test.found != nil {
			continue
		}
		want := kernel.Kubelet{Cgroup: test.place.Cgroup, PID: test.place.PID, WithPods: test.place.WithPods}
		if len(f.set) != 1 || f.set[0] != want {
			t.Errorf("%s: set %+v, want %+v", test.name, f.set, want)
		}
	}
}
