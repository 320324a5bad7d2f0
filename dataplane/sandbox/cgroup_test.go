package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

const (
	web  = "6f1c6c9e-2a0b-4d6e-9d0c-0c1b2a3f4e5d"
	db   = "9a8b7c6d-1111-2222-3333-444455556666"
	etcd = "0123456789abcdef0123456789abcdef" // a static pod's hash
)

func TestPodOfACgroup(t *testing.T) {
	const webSlice = "pod6f1c6c9e_2a0b_4d6e_9d0c_0c1b2a3f4e5d.slice"
	for _, tt := range []struct{ path, uid string }{
		{"/kubepods/burstable/pod" + web + "/4c1d", web},
		{"/kubepods/pod" + web, web},
		{"/kubepods/besteffort/pod" + etcd + "/4c1d", etcd},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + webSlice + "/cri-containerd-4c1d.scope", web},
		{"/kubepods.slice/kubepods-" + webSlice + "/crio-4c1d.scope", web},
		{"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-" + webSlice + "/x", web},
		{"/kubelet/kubepods/burstable/pod" + web + "/4c1d", web},
		{"/../../pod" + web + "/4c1d", web},
		{"/../../../besteffort/pod" + web + "/4c1d", web},
		{"/../../kubepods-burstable-" + webSlice + "/cri-containerd-4c1d.scope", web},
		// A container that may make cgroups names them as it likes.
		{"/kubepods/burstable/pod" + web + "/4c1d/kubepods/pod" + db, web},
		{"/../../pod" + web + "/4c1d/pod" + db, web},
		{"/kubepods.slice/kubepods-" + webSlice + "/x/kubepods-pod9a8b7c6d_1111_2222_3333_444455556666.slice", web},
		{"/user.slice/pod" + web, ""},
		{"/", ""},
		{"", ""},
		{"/kubepods/burstable", ""},
		{"/../4c1d", ""},
		{"/system.slice/containerd.service", ""},
		{"/podruntime/runtime", ""},
	} {
		if got := podIn(tt.path); got != tt.uid {
			t.Errorf("%s is of %q, want %q", tt.path, got, tt.uid)
		}
	}
}

func TestPodOfAProcess(t *testing.T) {
	for _, tt := range []struct {
		name, cgroup, uid string
		err               error
	}{
		{"v2", "0::/kubepods/pod" + web + "/x\n", web, nil},
		{"v1", "12:cpu,cpuacct:/kubepods/pod" + web + "/x\n3:devices:/\n1:name=systemd:/kubepods/pod" + web + "/x\n0::/\n", web, nil},
		{"of two pods", "2:cpu:/kubepods/pod" + web + "\n0::/kubepods/pod" + db + "\n", "", errAmbiguous},
		{"of the host", "0::/init.scope\n", "", nil},
		{"malformed", "\n::\nx\n", "", nil},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "cgroup"), []byte(tt.cgroup), 0o600); err != nil {
			t.Fatal(err)
		}
		if uid, err := podOf(dir); uid != tt.uid || !errors.Is(err, tt.err) {
			t.Errorf("%s: %q, %v, want %q, %v", tt.name, uid, err, tt.uid, tt.err)
		}
	}
}

func FuzzPodIn(f *testing.F) {
	f.Add("/kubepods/burstable/pod" + web + "/4c1d")
	f.Add("/../../kubepods-burstable-pod6f1c6c9e_2a0b.slice/x")
	f.Fuzz(func(t *testing.T, path string) {
		if uid := podIn(path); uid != normal(uid) {
			t.Errorf("%q is not in its normal form", uid)
		}
		// Nothing that a pod appends to its cgroup's path changes whose it is.
		if uid := podIn("/kubepods/pod" + web + "/" + path); uid != web {
			t.Errorf("below it: %q", uid)
		}
	})
}
