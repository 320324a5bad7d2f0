package cluster

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/e2e/space"
)

// apiPort is the API server's.
const apiPort = 6443

// control is the control plane: what runs on no node.
type control struct {
	c      *Cluster
	space  *space.Space
	dir    string
	logs   string
	cgroup string

	admin    account
	proxy    account
	manager  account
	schedule account
	kubelets []account

	etcd, api, managerProcess, scheduler *process
}

func newControl(c *Cluster) (*control, error) {
	ctl := &control{c: c, dir: filepath.Join(stateDir, "control"), logs: filepath.Join(stateDir, "log")}
	if err := os.MkdirAll(ctl.dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if ctl.space, err = space.New(name + "-control"); err != nil {
		return nil, err
	}
	cgroups, err := makeCgroups("control")
	if err != nil {
		return nil, err
	}
	ctl.cgroup = unifiedDir(cgroups)
	return ctl, errors.Join(ctl.wire(), ctl.writeCredentials())
}

// wire makes the bridge that the nodes are plugged into.
func (ctl *control) wire() error {
	if err := ctl.space.AddBridge("br0"); err != nil {
		return err
	}
	for _, p := range ctl.c.plans() {
		if err := ctl.space.AddAddr("br0", netip.PrefixFrom(p.host(0), p.nodes.Bits())); err != nil {
			return err
		}
		for number := 1; number <= ctl.c.config.Nodes; number++ {
			if err := ctl.space.AddRoute("br0", p.podCIDR(number), p.host(number)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (ctl *control) file(name string) string { return filepath.Join(ctl.dir, name) }

func (ctl *control) writeCredentials() error {
	ca, err := newAuthority(ctl.dir)
	if err != nil {
		return err
	}
	addrs := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	for _, p := range ctl.c.plans() {
		addrs = append(addrs, p.host(0), p.apiService())
	}
	err = ca.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, addrs,
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
	if err != nil {
		return err
	}
	// What the API server shows to kubelets, for exec and logs.
	if err := ca.issue("kubelet-client", pkix.Name{CommonName: "kube-apiserver", Organization: []string{"system:masters"}}, nil); err != nil {
		return err
	}
	if _, err := ca.newKey("service-accounts"); err != nil {
		return err
	}
	ctl.admin = newAccount("admin", "system:masters")
	ctl.manager = newAccount("system:kube-controller-manager", "")
	ctl.schedule = newAccount("system:kube-scheduler", "")
	ctl.proxy = newAccount("system:kube-proxy", "")
	accounts := []account{ctl.admin, ctl.manager, ctl.schedule, ctl.proxy}
	for i := range ctl.c.config.Nodes {
		kubelet := newAccount("system:node:"+nodeName(i+1), "system:nodes")
		ctl.kubelets = append(ctl.kubelets, kubelet)
		accounts = append(accounts, kubelet)
	}
	errs := []error{writeTokens(ctl.file("tokens.csv"), accounts...)}
	for file, a := range map[string]account{"admin": ctl.admin, "manager": ctl.manager, "scheduler": ctl.schedule} {
		errs = append(errs, a.writeKubeconfig(ctl.file(file+".kubeconfig"), ctl.c.apiURL(), ctl.file("ca.crt")))
	}
	return errors.Join(errs...)
}

func (ctl *control) launch(command string, args ...string) (*process, error) {
	l := launch{
		name: command, space: ctl.space, cgroup: ctl.cgroup,
		log: filepath.Join(ctl.logs, command+".log"),
	}
	return l.start(ctl.c.parts.Kubernetes(command), args...)
}

// startEtcd leaves out fsync: the data need not outlive the machine.
func (ctl *control) startEtcd() (err error) {
	ctl.etcd, err = ctl.launch("etcd", "--data-dir="+ctl.file("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380")
	return err
}

func (ctl *control) startAPI() (err error) {
	var services []string
	for _, p := range ctl.c.plans() {
		services = append(services, p.services.String())
	}
	ctl.api, err = ctl.launch("kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=::", fmt.Sprintf("--secure-port=%d", apiPort),
		"--advertise-address="+ctl.c.plans()[0].host(0).String(),
		"--service-cluster-ip-range="+strings.Join(services, ","),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--token-auth-file="+ctl.file("tokens.csv"),
		"--tls-cert-file="+ctl.file("apiserver.crt"), "--tls-private-key-file="+ctl.file("apiserver.key"),
		"--service-account-key-file="+ctl.file("service-accounts.pub"),
		"--service-account-signing-key-file="+ctl.file("service-accounts.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--kubelet-client-certificate="+ctl.file("kubelet-client.crt"), "--kubelet-client-key="+ctl.file("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP", "--endpoint-reconciler-type=lease",
		// There is no kube-proxy here: webhooks are called by their pods' addresses.
		"--enable-aggregator-routing=true")
	return err
}

// startControllers starts those that give up for long when there is no API server yet.
func (ctl *control) startControllers() (err error) {
	conf := func(name string) []string {
		file := ctl.file(name + ".kubeconfig")
		return []string{
			"--kubeconfig=" + file, "--authentication-kubeconfig=" + file, "--authorization-kubeconfig=" + file,
			"--leader-elect=false",
		}
	}
	var pods []string
	for _, p := range ctl.c.plans() {
		pods = append(pods, p.pods.String())
	}
	ctl.managerProcess, err = ctl.launch("kube-controller-manager", append(conf("manager"),
		"--service-account-private-key-file="+ctl.file("service-accounts.key"), "--root-ca-file="+ctl.file("ca.crt"),
		"--use-service-account-credentials", "--allocate-node-cidrs=false", "--cluster-cidr="+strings.Join(pods, ","))...)
	if err != nil {
		return err
	}
	ctl.scheduler, err = ctl.launch("kube-scheduler", conf("scheduler")...)
	return err
}

// readyTimeout is for the API server to answer, and for nodes to be ready.
const readyTimeout = 2 * time.Minute

// awaitAPI waits for a ready API server, or for its end.
func (ctl *control) awaitAPI(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	client, err := ctl.c.httpClient()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	for {
		err := get(ctx, client, ctl.c.apiURL()+"/readyz")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the API server: %w\n%s", err, ctl.api.tail())
		case <-ctl.api.done:
			return fmt.Errorf("the API server has ended: %w\n%s", ctl.api.err, ctl.api.tail())
		case <-ctl.etcd.done:
			return fmt.Errorf("etcd has ended: %w\n%s", ctl.etcd.err, ctl.etcd.tail())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (ctl *control) close() error {
	var errs []error
	for _, p := range []*process{ctl.scheduler, ctl.managerProcess, ctl.api, ctl.etcd} {
		errs = append(errs, p.kill())
	}
	if ctl.space != nil {
		errs = append(errs, ctl.space.Close())
	}
	return errors.Join(errs...)
}

// StopAPIServer kills the API server: nobody reads or writes the cluster's state any more,
// and every watch breaks.
func (c *Cluster) StopAPIServer() error { return c.control.api.kill() }

// StartAPIServer starts it again and waits until it is ready. The controllers, which end
// when they have lost it, are started too.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	if err := c.control.startAPI(); err != nil {
		return err
	}
	if err := c.control.awaitAPI(ctx); err != nil {
		return err
	}
	if c.control.managerProcess.running() && c.control.scheduler.running() {
		return nil
	}
	if err := errors.Join(c.control.managerProcess.kill(), c.control.scheduler.kill()); err != nil {
		return err
	}
	return c.control.startControllers()
}
