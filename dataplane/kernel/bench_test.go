package kernel_test

import (
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// BenchmarkEnrolAndRelease opens and removes one pod, without the waiting that Guard does.
func BenchmarkEnrolAndRelease(b *testing.B) {
	netnstest.Require(b)
	for _, m := range modes() {
		b.Run(m.name, func(b *testing.B) {
			f := newFixture(b, m)
			cfg := kernel.PodConfig{UID: "web", NetNS: f.web.Path(), Addrs: f.web.Addrs()}
			for b.Loop() {
				pod, err := f.dp.OpenPod(cfg)
				if err != nil {
					b.Fatal(err)
				}
				for _, step := range []func() error{pod.CaptureOutbound, pod.CaptureInbound, pod.Remove} {
					if err := step(); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkDescriptorsPerPod reports what a prepared pod keeps open.
func BenchmarkDescriptorsPerPod(b *testing.B) {
	netnstest.Require(b)
	f := newFixture(b, modes()[0])
	kept := 0
	for b.Loop() {
		before := openFDs(b)
		pod, err := f.dp.OpenPod(kernel.PodConfig{UID: "web", NetNS: f.web.Path(), Addrs: f.web.Addrs()})
		if err != nil {
			b.Fatal(err)
		}
		kept += openFDs(b) - before
		if err := pod.Remove(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(kept)/float64(b.N), "fds/pod")
}

// BenchmarkRepairOfASoundPod is what the agent does for every pod every few seconds.
func BenchmarkRepairOfASoundPod(b *testing.B) {
	netnstest.Require(b)
	for _, m := range modes() {
		b.Run(m.name, func(b *testing.B) {
			f := newFixture(b, m)
			pod, err := f.dp.OpenPod(kernel.PodConfig{UID: "web", NetNS: f.web.Path(), Addrs: f.web.Addrs()})
			if err != nil {
				b.Fatal(err)
			}
			if err := pod.Guard(b.Context()); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if mended, err := pod.Repair(); len(mended) > 0 || err != nil {
					b.Fatal(mended, err)
				}
			}
			if err := pod.Remove(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
