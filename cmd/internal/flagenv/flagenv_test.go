package flagenv_test

import (
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/raceway-mesh/raceway/cmd/internal/flagenv"
)

func TestEnvironmentSetsWhatTheCommandLineLeavesAlone(t *testing.T) {
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	flags.String("listen", "", "")
	flags.String("data-dir", "", "")
	flags.StringSlice("tls-name", nil, "")
	flags.Duration("ttl", 0, "")
	flags.Duration("max-ttl", 0, "")
	if err := flags.Parse([]string{"--listen=:1"}); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"RACEWAY_CA_LISTEN": ":2", "RACEWAY_CA_DATA_DIR": "/data", "RACEWAY_CA_TLS_NAME": "a,b", "RACEWAY_CA_TTL": "1h"}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	if err := flagenv.Set(flags, "RACEWAY_CA_", lookup); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"listen": ":1", "data-dir": "/data", "tls-name": "[a,b]", "ttl": "1h0m0s"} {
		if got := flags.Lookup(name).Value.String(); got != want {
			t.Errorf("--%s is %q, want %q", name, got, want)
		}
	}
	env["RACEWAY_CA_MAX_TTL"] = "soon"
	if err := flagenv.Set(flags, "RACEWAY_CA_", lookup); err == nil || !strings.Contains(err.Error(), "RACEWAY_CA_MAX_TTL") {
		t.Errorf("error %v", err)
	}
}
