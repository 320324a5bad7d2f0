package enroll

import (
	"testing"
	"time"
)

// Whatever a pod waits for, Status can say it.
func TestEveryStepOnTheWayOutHasAReason(t *testing.T) {
	cfg := Config{}.withDefaults()
	now := time.Now()
	facts := []fact{off, on, unsure}
	for _, prepared := range facts {
		for _, published := range facts {
			for _, outbound := range facts {
				for _, inbound := range facts {
					for _, guard := range facts {
						p := &pod{prepared: prepared, published: published, outbound: outbound, inbound: inbound, guard: guard}
						if next := p.plan(now, &cfg, ""); next.why == "" {
							t.Errorf("%+v: step %v without a reason", p, next.do)
						}
					}
				}
			}
		}
	}
}
