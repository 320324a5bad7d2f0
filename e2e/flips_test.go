package e2e

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// flips is how often the label is put on or taken off in a test.
const flips = 100

// New connections are made all the time while the label comes and goes, at moments that fall
// into every phase of enrolment and release. None may fail or lose a byte, and connections
// from before the first flip and from between flips go on.
func TestLabelFlipsUnderLoadFailNoConnection(t *testing.T) {
	eachFamilyInFull(t, func(t *testing.T, opts lab.Options) {
		c := newCluster(t, opts)
		client, server := c.pod("web", 1), c.pod("db", 2)
		serve(t, server, 3306, echo)
		c.start()
		target := server.AddrPort(3306)

		lasting := []steady{open(t, client, target)}
		traffic := startLoad(t, 4, client, target)
		modes := []string{dataplane.ModeAmbient, ""}
		for i := range flips {
			t.Logf("%s: flip %d to %q", time.Now().Format("15:04:05.000"), i, modes[i%2])
			if err := c.LabelNamespace("shop", modes[i%2]); err != nil {
				t.Fatal(err)
			}
			// From a fraction of one settle to beyond a whole enrolment.
			time.Sleep(time.Duration(rand.IntN(900)) * time.Millisecond / 4)
			if i%10 == 0 {
				lasting = append(lasting, open(t, client, target))
			}
			for j, s := range lasting {
				if err := s.use(); err != nil {
					t.Fatalf("flip %d: connection %d of %d: %v", i, j, len(lasting), err)
				}
			}
			if i%25 == 24 {
				c.label(dataplane.ModeAmbient) // all the way in
			}
		}
		errs := traffic.stop()
		for i, err := range errs {
			if i == 10 {
				t.Errorf("… and %d more", len(errs)-i)
				break
			}
			t.Error(err)
		}
		t.Logf("%d connections over %d flips, %d failed", traffic.count.Load(), flips, len(errs))
		if traffic.count.Load() < flips {
			t.Errorf("only %d connections were made: too few to have met every phase", traffic.count.Load())
		}
	})
}
