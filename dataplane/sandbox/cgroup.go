package sandbox

import (
	"bufio"
	"errors"
	"io"
	"os"
	"strings"
)

// maxCgroups bounds what is read of a process's cgroup file: a line for each hierarchy.
const maxCgroups = 64 << 10

// errAmbiguous says that the hierarchies of cgroup v1 put a process into different pods.
var errAmbiguous = errors.New("its cgroups are of different pods")

// podOf returns the UID of the pod that the process in dir belongs to, "" for none.
func podOf(dir string) (uid string, err error) {
	file, err := os.Open(dir + "/cgroup")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	lines := bufio.NewScanner(io.LimitReader(file, maxCgroups))
	for lines.Scan() {
		// hierarchy:controllers:path, see cgroups(7)
		fields := strings.SplitN(lines.Text(), ":", 3)
		if len(fields) < 3 {
			continue
		}
		found := podIn(fields[2])
		if found == "" || found == uid {
			continue
		}
		if uid != "" {
			return "", errAmbiguous
		}
		uid = found
	}
	return uid, lines.Err()
}

// podIn returns the UID of the pod that a cgroup belongs to, "" for none.
//
//	/kubepods/burstable/pod<uid>/<container>                          the cgroupfs driver
//	/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid, _ for ->.slice/…
//	/../../pod<uid>/<container>                 seen from a cgroup namespace below kubepods
//
// The first pod on the way counts: what follows is the pod's to name.
func podIn(path string) string {
	below := strings.HasPrefix(path, "/../") // perhaps: the way there is not shown
	for element := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		below = below || isKubepods(element)
		if uid := podNamed(element); below && uid != "" {
			return uid
		}
	}
	return ""
}

// isKubepods knows the kubelet's own cgroup, also below one that it was configured with,
// which systemd puts before it ("kubelet-kubepods.slice").
func isKubepods(element string) bool {
	name, _, _ := strings.Cut(element, ".slice")
	return name == "kubepods" || strings.HasPrefix(name, "kubepods-") || strings.Contains(name, "-kubepods")
}

func podNamed(element string) string {
	if slice, ok := strings.CutSuffix(element, ".slice"); ok {
		if at := strings.LastIndex(slice, "-pod"); at >= 0 {
			return normal(slice[at+len("-pod"):])
		}
		return ""
	}
	uid, _ := strings.CutPrefix(element, "pod")
	if uid == element {
		return ""
	}
	return normal(uid)
}

// normal undoes what systemd's names ask for: they cannot hold a dash.
func normal(uid string) string { return strings.ReplaceAll(uid, "_", "-") }
