package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// Kubectl runs kubectl as the administrator and returns its output. What it complains of is
// in the error.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.kubectl(ctx, nil, args...)
}

// Apply applies YAML, one document or many.
func (c *Cluster) Apply(ctx context.Context, manifest string) error {
	_, err := c.kubectl(ctx, strings.NewReader(manifest), "apply", "-f", "-")
	return err
}

func (c *Cluster) kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	out, err := c.Run(c.KubectlCommand(ctx, stdin, args...))
	if err != nil {
		return out, fmt.Errorf("kubectl %s: %w", strings.Join(args, " "), err)
	}
	return out, nil
}

// KubectlCommand is for Run.
func (c *Cluster) KubectlCommand(ctx context.Context, stdin io.Reader, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.parts.Kubernetes("kubectl"), append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
	cmd.Stdin = stdin
	return cmd
}

// Kubeconfig is the administrator's. It is of use from the control plane's namespace (Run).
func (c *Cluster) Kubeconfig() string { return c.control.file("admin.kubeconfig") }

// Run runs a command where an administrator would sit: in the control plane's network
// namespace. It returns what the command wrote to its output; what it complained of is in
// the error.
func (c *Cluster) Run(cmd *exec.Cmd) (string, error) {
	out, err := run(c.control.space, cmd)
	return string(out), err
}

// Administrator is the network namespace that Run runs commands in.
func (c *Cluster) Administrator() *netns.Namespace { return c.control.space.NS }

// dial connects from the control plane's namespace.
func (c *Cluster) dial(ctx context.Context, _, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	return c.control.space.NS.Dial(ctx, netns.DialConfig{Remote: to})
}

// RESTConfig calls the API server as the administrator, from any namespace.
func (c *Cluster) RESTConfig() *rest.Config {
	return &rest.Config{
		Host:            c.apiURL(),
		BearerToken:     c.control.admin.token,
		TLSClientConfig: rest.TLSClientConfig{CAFile: c.control.file("ca.crt")},
		Dial:            c.dial,
		QPS:             200, Burst: 400,
	}
}

// Client calls the API server as the administrator.
func (c *Cluster) Client() (*kubernetes.Clientset, error) {
	return kubernetes.NewForConfig(c.RESTConfig())
}

func (c *Cluster) httpClient() (*http.Client, error) {
	ca, err := os.ReadFile(c.control.file("ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{DialContext: c.dial, TLSClientConfig: &tls.Config{RootCAs: roots}},
	}, nil
}

// get wants a status of 200.
func get(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	var body bytes.Buffer
	_, err = body.ReadFrom(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(body.Bytes()))
	}
	return nil
}

// nodeObjects are made before the kubelets register: they carry the pods' ranges, which
// nobody allocates here.
func (c *Cluster) nodeObjects() string {
	var docs strings.Builder
	for _, n := range c.nodes {
		cidrs := make([]string, 0, len(n.PodCIDRs))
		for _, p := range n.PodCIDRs {
			cidrs = append(cidrs, fmt.Sprintf("%q", p))
		}
		fmt.Fprintf(&docs, "---\napiVersion: v1\nkind: Node\nmetadata: {name: %s}\nspec: {podCIDR: %s, podCIDRs: [%s]}\n",
			n.Name, cidrs[0], strings.Join(cidrs, ", "))
	}
	return docs.String()
}

// AwaitNodes waits until every node that is on is ready.
func (c *Cluster) AwaitNodes(ctx context.Context) error {
	args := []string{"wait", "--for=condition=Ready", "--timeout=" + readyTimeout.String()}
	for _, n := range c.nodes {
		if n.On() {
			args = append(args, "node/"+n.Name)
		}
	}
	if _, err := c.Kubectl(ctx, args...); err != nil {
		return fmt.Errorf("wait for the nodes: %w\n%s", err, c.Logs())
	}
	return nil
}

// awaitRegistration waits until the kubelets have said who they are.
func (c *Cluster) awaitRegistration(ctx context.Context) error {
	for _, n := range c.nodes {
		if _, err := c.Kubectl(ctx, "wait", "--for=jsonpath={.status.nodeInfo.kubeletVersion}", "node/"+n.Name, "--timeout="+readyTimeout.String()); err != nil {
			return fmt.Errorf("wait for the nodes: %w\n%s", err, c.Logs())
		}
	}
	return nil
}
