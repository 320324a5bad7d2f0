package kube

import (
	"fmt"
	"maps"
	"testing"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

// tunnelPort is where HBONE is spoken.
const tunnelPort = 15008

// captured waits until the agents have captured pods, or none of them.
func (w *world) captured(t *testing.T, namespace string, want bool, pods ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("captured: %v", want), func() error {
		found, err := w.workloads(t.Context(), namespace)
		if err != nil {
			return err
		}
		for _, p := range pods {
			if got := found[p].Capture == "captured"; got != want {
				return fmt.Errorf("%s is %+v", p, found[p])
			}
		}
		return nil
	})
}

// wire captures what crosses the uplink of a node.
func (w *world) wire(t *testing.T, node int) *lab.Capture {
	t.Helper()
	c, err := w.Node(node).Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// seen says whether the text crossed the wire in clear, and how many packets of tunnels did.
func seen(t *testing.T, wire *lab.Capture, text string) (clear bool, tunnels int) {
	t.Helper()
	clear, err := wire.Contains(t.Context(), []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	tunnels, err = wire.CountPort(t.Context(), tunnelPort)
	if err != nil {
		t.Fatal(err)
	}
	dropped, err := wire.Dropped(t.Context())
	if err != nil || dropped > 0 {
		t.Fatalf("%d packets were not captured: %v", dropped, err)
	}
	return clear, tunnels
}

// TestALabelEnrolsWithoutARestart goes there and back, with clients that ask all the time.
func TestALabelEnrolsWithoutARestart(t *testing.T) {
	w := onMesh(t)
	const ns = "shop"
	w.shop(t, ns)
	pods := []string{"server1", "server2", "loop", "hold"}
	lives := w.lives(t, ns)
	loop, hold := w.unharmed(t, ns, "loop", count{}), w.unharmed(t, ns, "hold", count{})
	wire := w.wire(t, 2)
	across := func() string {
		text := needle()
		w.must(t, ns, "loop", "get", "http://"+w.host(t, ns, "server2")+":8080/"+text)
		return text
	}
	if clear, tunnels := seen(t, wire, across()); !clear || tunnels > 0 {
		t.Fatalf("before the label: in clear %v, %d packets of tunnels", clear, tunnels)
	}

	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.captured(t, ns, true, pods...)
	if clear, tunnels := seen(t, wire, across()); clear || tunnels == 0 {
		t.Errorf("with the label: in clear %v, %d packets of tunnels", clear, tunnels)
	}
	for _, url := range []string{"http://server/", "http://headless:8080/", "http://" + w.host(t, ns, "server1") + ":8080/"} {
		w.must(t, ns, "loop", "get", url)
	}
	loop, hold = w.unharmed(t, ns, "loop", loop), w.unharmed(t, ns, "hold", hold)
	if now := w.lives(t, ns); !maps.Equal(now, lives) {
		t.Errorf("pods have changed: %v, now %v", lives, now)
	}

	w.kubectl(t, "label", "namespace", ns, plain)
	w.captured(t, ns, false, pods...)
	if clear, _ := seen(t, wire, across()); !clear {
		t.Error("without the label: not in clear")
	}
	w.unharmed(t, ns, "loop", loop)
	w.unharmed(t, ns, "hold", hold)
	if now := w.lives(t, ns); !maps.Equal(now, lives) {
		t.Errorf("pods have changed: %v, now %v", lives, now)
	}
}

// TestACanaryPodEnrolsAlone labels one pod of a namespace that is not enrolled.
func TestACanaryPodEnrolsAlone(t *testing.T) {
	w := onMesh(t)
	const ns = "canary"
	w.shop(t, ns)
	loop := w.unharmed(t, ns, "loop", count{})
	w.kubectl(t, "-n", ns, "label", "pod", "server2", enrolled)
	w.captured(t, ns, true, "server2")
	w.captured(t, ns, false, "server1", "loop")
	loop = w.unharmed(t, ns, "loop", loop)
	w.kubectl(t, "-n", ns, "label", "pod", "server2", plain)
	w.captured(t, ns, false, "server2")
	w.unharmed(t, ns, "loop", loop)
}
