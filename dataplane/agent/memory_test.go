package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestMappingsThatWereWrittenToAreKept(t *testing.T) {
	smaps := filepath.Join(t.TempDir(), "smaps")
	content := `00400000-00401000 r-xp 00000000 08:01 42                         /agent
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00401000-00402000 r--p 00001000 08:01 42                         /agent
Rss:                   4 kB
Anonymous:             4 kB
00402000-00403000 rw-p 00002000 08:01 42                         /agent
Anonymous:             0 kB
00403000-00404000 r--p 00000000 08:01 43                         /other
Anonymous:             0 kB
00404000-00405000 rw-p 00000000 00:00 0
Anonymous:             0 kB
00405000-00406000 r--p 00003000 08:01 42                         /agent
Anonymous:             0 kB
`
	if err := os.WriteFile(smaps, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := cleanMappings(smaps, "/agent")
	if want := []mapping{{0x400000, 0x401000}, {0x405000, 0x406000}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%x, %v, want %x", got, err, want)
	}
}

// What was forgotten is there again when it is needed.
func TestForgottenProgramRunsOn(t *testing.T) {
	resident := func() int {
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(status)) {
			if value, ok := strings.CutPrefix(line, "RssFile:"); ok {
				kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")))
				if err != nil {
					t.Fatal(err)
				}
				return kib
			}
		}
		t.Fatal("no RssFile")
		return 0
	}
	before := resident()
	if err := forgetProgram("/proc/self/smaps"); err != nil {
		t.Fatal(err)
	}
	if now := resident(); now >= before {
		t.Errorf("%d KiB of files resident, had %d", now, before)
	}
	TestMappingsThatWereWrittenToAreKept(t)
}
