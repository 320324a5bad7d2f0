package agent

import (
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

// Those who come while somebody reads share the next reading, and none shares one that had begun.
func TestTranslationsAreReadTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var readings [][]netip.Addr
		proceed := make(chan struct{})
		tr := &translations{turn: make(chan struct{}, 1), next: &reading{}, forget: func(addrs []netip.Addr) (uint, error) {
			readings = append(readings, slices.Clone(addrs))
			<-proceed
			return 0, nil
		}}
		addr := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, i}) }
		var callers sync.WaitGroup
		call := func(i byte) {
			callers.Go(func() {
				if err := tr.of([]netip.Addr{addr(i)}); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		for i := range byte(5) {
			call(i) // the first one reads
		}
		proceed <- struct{}{}
		synctest.Wait()
		call(5) // the others' reading is under way
		close(proceed)
		callers.Wait()
		slices.SortFunc(readings[1], netip.Addr.Compare)
		want := [][]netip.Addr{{addr(0)}, {addr(1), addr(2), addr(3), addr(4)}, {addr(5)}}
		if !slices.EqualFunc(readings, want, slices.Equal) {
			t.Errorf("read for %v, want %v", readings, want)
		}
	})
}
