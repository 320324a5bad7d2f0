package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Paths in the node.
const (
	containerdSocket = "/run/containerd/containerd.sock"
	kubeletKubeconf  = "/etc/kubernetes/kubelet.kubeconfig"
	proxyKubeconf    = "/etc/kubernetes/kube-proxy.kubeconfig"
	clientCA         = "/etc/kubernetes/ca.crt"
	manifests        = "/etc/kubernetes/manifests"
	cniConfigs       = "/etc/cni/net.d"
	cniPlugins       = "/opt/cni/bin"
)

// startTimeout is for containerd to answer.
const startTimeout = time.Minute

// run starts what a node runs, in order, and then reaps.
func (c Config) run(ctx context.Context) error {
	if err := c.settle(); err != nil {
		return err
	}
	if err := c.prepare(); err != nil {
		return err
	}
	ps := newProcesses(c)
	debian := filepath.Join(PartsDir, "debian")
	containerd := filepath.Join(debian, "usr/bin/containerd")
	if err := ps.start("containerd", containerd, "--config", "/etc/containerd/config.toml"); err != nil {
		return err
	}
	if err := c.loadPause(ctx, ps, filepath.Join(debian, "usr/bin/ctr")); err != nil {
		return err
	}
	if c.AwaitAPI {
		if err := awaitAPI(ctx, c.APIServer); err != nil {
			return err
		}
	}
	if err := ps.start("kubelet", filepath.Join(PartsDir, "kubernetes/kubelet"), c.kubeletArgs()...); err != nil {
		return err
	}
	if c.ProxyMode != "none" {
		if err := ps.start("kube-proxy", filepath.Join(PartsDir, "kubernetes/kube-proxy"),
			"--config=/etc/kubernetes/kube-proxy.yaml", "--hostname-override="+c.Name, "-v=2"); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// Environment is that of all processes of the node. The packages are not where they expect
// to be.
func Environment() []string {
	debian := filepath.Join(PartsDir, "debian")
	libraries := filepath.Join(debian, "usr/lib/x86_64-linux-gnu")
	return []string{
		"PATH=" + strings.Join([]string{alternatives, debian + "/usr/bin", debian + "/usr/sbin", debian + "/sbin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}, ":"),
		"LD_LIBRARY_PATH=" + libraries + ":" + filepath.Join(debian, "lib/x86_64-linux-gnu"),
		"XTABLES_LIBDIR=" + filepath.Join(libraries, "xtables"),
		"HOME=/root",
	}
}

// alternatives is where programs are that Debian names when it installs a package.
const alternatives = "/run/alternatives"

// nameAlternatives makes iptables those that write nftables rules, as Debian does.
func nameAlternatives() error {
	if err := os.MkdirAll(alternatives, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		errs = append(errs, os.Symlink(filepath.Join(PartsDir, "debian/usr/sbin/xtables-nft-multi"), filepath.Join(alternatives, name)))
	}
	return errors.Join(errs...)
}

// prepare writes what the processes read. What is on the disk already stays as it is: others
// may have changed it.
func (c Config) prepare() error {
	for _, dir := range []string{"/run/netns", "/run/lock", filepath.Dir(containerdSocket), manifests, cniConfigs, cniPlugins, "/etc/containerd"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
	}
	if err := nameAlternatives(); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	files := map[string]string{
		"/etc/containerd/config.toml":               c.containerdConfig(),
		"/etc/kubernetes/kubelet.yaml":              c.kubeletConfig(),
		"/etc/kubernetes/kube-proxy.yaml":           c.proxyConfig(),
		"/proc/sys/net/ipv4/ip_forward":             "1",
		"/proc/sys/net/ipv4/conf/all/rp_filter":     "0",
		"/proc/sys/net/ipv4/conf/default/rp_filter": "0",
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		files["/proc/sys/net/ipv6/conf/all/forwarding"] = "1"
	}
	// Without these a reply to a pod on the same bridge would not be translated back.
	for _, bridge := range []string{"/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables"} {
		if _, err := os.Stat(bridge); err == nil {
			files[bridge] = "1"
		}
	}
	for name, content := range files {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
	}
	if err := copyNew(filepath.Join(PartsDir, "debian/usr/lib/cni"), cniPlugins); err != nil {
		return fmt.Errorf("prepare the CNI plugins: %w", err)
	}
	if c.CNI != "bridge" {
		return nil
	}
	list := filepath.Join(cniConfigs, "10-bridge.conflist")
	if _, err := os.Stat(list); err == nil {
		return nil
	}
	if err := os.WriteFile(list, []byte(c.bridgeConfig()), 0o644); err != nil {
		return fmt.Errorf("prepare CNI: %w", err)
	}
	return nil
}

// copyNew copies the files that are missing.
func copyNew(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		target := filepath.Join(to, e.Name())
		if _, err := os.Stat(target); err == nil {
			continue
		}
		content, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err != nil {
			return err
		}
		if err := os.WriteFile(target, content, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// loadPause waits for containerd and gives it the image that every pod needs.
func (c Config) loadPause(ctx context.Context, ps *processes, ctr string) error {
	deadline := time.Now().Add(startTimeout)
	for {
		err := ps.run(ctr, "version")
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for containerd: %w", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return ps.run(ctr, "-n", "k8s.io", "images", "import", c.PauseImage)
}

func awaitAPI(ctx context.Context, url string) error {
	client := &http.Client{
		Timeout: 2 * time.Second,
		// Whether it is there is all that is asked.
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
	}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/readyz", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			_, err := io.Copy(io.Discard, resp.Body)
			if errors.Join(err, resp.Body.Close()) == nil && resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the API server: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}
