// Package version says which version of Raceway a program is.
package version

import "runtime/debug"

// linked is set by the linker:
// -X github.com/raceway-mesh/raceway/cmd/internal/version.linked=v1.2.3
var linked string

// String is what the linker was told, or else what the Go toolchain recorded.
func String() string {
	if linked != "" {
		return linked
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && v == "(devel)" {
			v = "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	if v == "" {
		return "unknown"
	}
	return v
}
