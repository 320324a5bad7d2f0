package kernel

import (
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// updateSocketStorage is BPF_MAP_UPDATE_ELEM (bpf(2)) of a map of socket storage, for each socket that
// is made: a raw system call, which does not wait, leaves Go's scheduler out and allocates nothing.
func updateSocketStorage[T any](m *ebpf.Map, socket int, value *T) error {
	key := uint32(socket)
	attr := struct { // union bpf_attr of the *_ELEM commands
		mapFD uint32
		_     uint32
		key   unsafe.Pointer
		value unsafe.Pointer
		flags uint64
	}{mapFD: uint32(m.FD()), key: unsafe.Pointer(&key), value: unsafe.Pointer(value)}
	if _, _, errno := unix.RawSyscall(unix.SYS_BPF, unix.BPF_MAP_UPDATE_ELEM, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
		return errno
	}
	return nil
}
