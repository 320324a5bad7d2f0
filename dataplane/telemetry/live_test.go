package telemetry

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestReportsRestWhileNothingIsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tel, registry := newTelemetry(t, Config{Interval: 10 * time.Second})
		stop := run(t, tel)
		defer stop()
		for range 2 { // they start again after a rest
			c := tel.Open(attempt())
			time.Sleep(6 * time.Second)
			before := sum(t, registry, "istio_tcp_sent_bytes_total")
			c.Sent(5)
			time.Sleep(6 * time.Second)
			synctest.Wait()
			if got := sum(t, registry, "istio_tcp_sent_bytes_total"); got != before+5 {
				t.Errorf("%v bytes reported, want 5 more than %v", got, before)
			}
			if !tel.reporting.Load() {
				t.Error("no report is due while a connection lives")
			}
			c.Close(FlagsNone, nil)
			time.Sleep(20 * time.Second)
			synctest.Wait()
			if tel.reporting.Load() {
				t.Error("a report is due though nothing is open")
			}
		}
	})
}

func TestEveryConnectionReportsWhileOthersComeAndGo(t *testing.T) {
	tel, registry := newTelemetry(t, Config{Interval: time.Second})
	const count = 2000
	var stays []*Conn
	for i := range count {
		c := tel.Open(attempt())
		if i%2 == 0 {
			stays = append(stays, c)
			c.Sent(1)
			continue
		}
		defer c.Close(FlagsNone, nil)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range count {
			tel.Open(attempt()).Close(FlagsNone, nil)
		}
	}()
	tel.report(time.Now().Add(time.Minute))
	<-done
	if got := sum(t, registry, "istio_tcp_sent_bytes_total"); got != count/2 {
		t.Errorf("%v bytes reported, want %d", got, count/2)
	}
	for _, c := range stays {
		c.Close(FlagsNone, nil)
	}
	if n := tel.Live(); n != count/2 {
		t.Errorf("%d live, want %d", n, count/2)
	}
}

// A connection may live for weeks; the snapshot of its day must not.
func TestOpenConnectionsKeepNoSnapshot(t *testing.T) {
	store := new(dataplane.Store)
	tel, _ := newTelemetry(t, Config{Store: store})
	stop := run(t, tel)
	defer stop()
	open := func() (*Conn, weak.Pointer[dataplane.Workload]) {
		a := attempt()
		store.Publish(dataplane.NewSnapshot(dataplane.Contents{Workloads: []dataplane.Workload{*a.Source.Workload, *a.Destination.Workload}}))
		snapshot, _ := store.Load()
		a.Source.Workload, a.Destination.Workload = &snapshot.Workloads()[1], &snapshot.Workloads()[0]
		return tel.Open(a), weak.Make(a.Source.Workload)
	}
	c, old := open()
	defer c.Close(FlagsNone, nil)
	for deadline := time.Now().Add(10 * time.Second); old.Value() != nil; time.Sleep(time.Millisecond) {
		store.Publish(dataplane.NewSnapshot(dataplane.Contents{}))
		runtime.GC()
		if time.Now().After(deadline) {
			t.Fatal("an open connection keeps the snapshot that it was routed by")
		}
	}
	if got := tel.Connections()[0]; got.Source.Workload != "web-abc12" || got.Source.Namespace != "shop" {
		t.Errorf("its source is %+v", got.Source)
	}
}
