package demo

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// objectKind is a command of bpf(2) that opens objects of one kind by their number.
type objectKind int

const (
	programByID objectKind = unix.BPF_PROG_GET_FD_BY_ID
	mapByID     objectKind = unix.BPF_MAP_GET_FD_BY_ID
	linkByID    objectKind = unix.BPF_LINK_GET_FD_BY_ID
)

func (k objectKind) String() string {
	return map[objectKind]string{programByID: "program", mapByID: "map", linkByID: "link"}[k]
}

// object is a program, map or link of the kernel. Numbers are not used again.
type object struct {
	kind objectKind
	id   uint32
}

func (o object) String() string { return fmt.Sprintf("BPF %s %d", o.kind, o.id) }

// bpfObjectExists asks the kernel for an object by its number.
func bpfObjectExists(kind objectKind, id uint32) (bool, error) {
	fd, err := bpf(int(kind), &struct{ id, next, flags uint32 }{id: id})
	switch {
	case err == nil:
		unix.Close(fd)
		return true, nil
	case errors.Is(err, unix.ENOENT):
		return false, nil
	}
	return false, fmt.Errorf("ask for BPF %s %d: %w", kind, id, err)
}

// bpf is bpf(2) for commands that give a descriptor. The BPF library is the data plane's
// alone, and two commands are no reason to share it.
func bpf[T any](command int, attr *T) (fd int, err error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}

// objectsOf finds what BPF objects a process holds, from what the kernel says of its
// descriptors (proc_pid_fdinfo(5)).
func objectsOf(pid int) (map[object]bool, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fdinfo")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("look for BPF objects of process %d: %w", pid, err)
	}
	found := make(map[object]bool)
	for _, e := range entries {
		file, err := os.Open(filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("look for BPF objects of process %d: %w", pid, err)
		}
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			if o, ok := parseObject(lines.Text()); ok {
				found[o] = true
			}
		}
		_ = file.Close() // it was only read; a descriptor that went meanwhile ends the reading
	}
	return found, nil
}

// parseObject reads a line such as "prog_id:	42".
func parseObject(line string) (object, bool) {
	key, value, _ := strings.Cut(line, ":")
	kind, ok := map[string]objectKind{"prog_id": programByID, "map_id": mapByID, "link_id": linkByID}[key]
	if !ok {
		return object{}, false
	}
	id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
	return object{kind, uint32(id)}, err == nil && id != 0
}
