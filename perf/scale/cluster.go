package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// writers is how many requests are under way, over connections.
const (
	writers     = 24
	connections = 4
)

// pod is what is known of a pod of the cluster.
type pod struct {
	number int
	name   string
	uid    types.UID

	mu    sync.Mutex // held over a change
	ready atomic.Bool
}

// site is the cluster that is measured on.
type site struct {
	config   Config
	plane    *cluster.ControlPlane
	dir      string
	clients  [connections]kubernetes.Interface
	policies dynamic.Interface
	pods     []*pod
	byApp    [][]*pod
	services []sync.Mutex // one writer at a time of each service's slice
}

// newSite starts a control plane and fills it.
func newSite(ctx context.Context, c Config) (_ *site, err error) {
	s := &site{config: c, byApp: make([][]*pod, c.Services), services: make([]sync.Mutex, c.Services)}
	if s.dir, err = os.MkdirTemp("/var/tmp", "raceway-scale-"); err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.plane, err = cluster.StartControlPlane(ctx, filepath.Base(s.dir), filepath.Join(s.dir, "cluster")); err != nil {
		return nil, err
	}
	for i := range s.clients {
		config := s.plane.RESTConfig()
		config.QPS, config.Burst = -1, 0
		config.ContentType = runtime.ContentTypeProtobuf
		if s.clients[i], err = kubernetes.NewForConfig(config); err != nil {
			return nil, err
		}
	}
	config := s.plane.RESTConfig()
	config.QPS, config.Burst = -1, 0
	if s.policies, err = dynamic.NewForConfig(config); err != nil {
		return nil, err
	}
	return s, s.fill(ctx)
}

func (s *site) close() error {
	var errs []error
	if s.plane != nil {
		errs = append(errs, s.plane.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

// fill writes the cluster's objects.
func (s *site) fill(ctx context.Context) error {
	c := s.config
	if err := s.applyCRDs(ctx); err != nil {
		return err
	}
	s.pods = make([]*pod, c.Pods)
	for _, step := range []struct {
		what  string
		count int
		write func(ctx context.Context, client kubernetes.Interface, n int) error
	}{
		{"namespaces", c.namespaces(), s.writeNamespace},
		{"nodes", c.Nodes, func(ctx context.Context, client kubernetes.Interface, n int) error {
			_, err := client.CoreV1().Nodes().Create(ctx, c.node(n), metav1.CreateOptions{})
			return err
		}},
		{"services", c.Services, func(ctx context.Context, client kubernetes.Interface, n int) error {
			_, err := client.CoreV1().Services(c.namespaceOf(n)).Create(ctx, c.service(n), metav1.CreateOptions{})
			return err
		}},
		{"policies", c.Policies, s.writePolicy},
		{"pods", c.Pods, s.writePod},
		{"EndpointSlices", c.Services, func(ctx context.Context, client kubernetes.Interface, n int) error {
			_, err := client.DiscoveryV1().EndpointSlices(c.namespaceOf(n)).Create(ctx, c.slice(n, s.byApp[n]), metav1.CreateOptions{})
			return err
		}},
	} {
		start := time.Now()
		if err := s.each(ctx, step.count, step.write); err != nil {
			return fmt.Errorf("write %s: %w", step.what, err)
		}
		if step.what == "pods" {
			for _, p := range s.pods {
				s.byApp[c.appOf(p.number)] = append(s.byApp[c.appOf(p.number)], p)
			}
		}
		c.Log.Info("written", "what", step.what, "count", step.count, "took", time.Since(start).Round(time.Millisecond))
	}
	return nil
}

// each calls write for all numbers below count, many at a time, until the first error.
func (s *site) each(ctx context.Context, count int, write func(context.Context, kubernetes.Interface, int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for ctx.Err() == nil {
				n := int(next.Add(1)) - 1
				if n >= count {
					return
				}
				if err := write(ctx, s.clients[w%connections], n); err != nil {
					cancel(fmt.Errorf("number %d: %w", n, err))
				}
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

func (s *site) applyCRDs(ctx context.Context) error {
	module, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/raceway-mesh/raceway").Output()
	if err != nil {
		return fmt.Errorf("find the CRDs: %w", err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(module)), "daemonset/crds/files/*.yaml"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("find the CRDs: there are none: %w", err)
	}
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if err := s.plane.Apply(ctx, string(content)); err != nil {
			return err
		}
	}
	_, err = s.plane.Kubectl(ctx, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
	return err
}

// writeNamespace writes what controllers would: the service account without which no pod is
// admitted.
func (s *site) writeNamespace(ctx context.Context, client kubernetes.Interface, n int) error {
	ns := s.config.namespace(n)
	if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return err
	}
	_, err := client.CoreV1().ServiceAccounts(ns.Name).Create(ctx,
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	return err
}

func (s *site) writePolicy(ctx context.Context, _ kubernetes.Interface, n int) error {
	p := s.config.policy(n)
	resource := schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"}
	if p.GetKind() == "PeerAuthentication" {
		resource.Resource = "peerauthentications"
	}
	_, err := s.policies.Resource(resource).Namespace(p.GetNamespace()).Create(ctx, p, metav1.CreateOptions{})
	return err
}

func (s *site) writePod(ctx context.Context, client kubernetes.Interface, n int) error {
	in := s.config.pod(n)
	made, err := client.CoreV1().Pods(in.Namespace).Create(ctx, in, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	made.Status = s.config.running(n, true)
	if _, err := client.CoreV1().Pods(in.Namespace).UpdateStatus(ctx, made, metav1.UpdateOptions{}); err != nil {
		return err
	}
	s.pods[n] = &pod{number: n, name: made.Name, uid: made.UID}
	s.pods[n].ready.Store(true)
	return nil
}
