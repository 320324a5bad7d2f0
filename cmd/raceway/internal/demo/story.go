package demo

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

const (
	namespace  = "shop"
	policyFile = "policy-db.yaml"
	policyName = "db-clients"

	// patience is for what takes a second on an idle machine.
	patience = 30 * time.Second
	// watchTime is how long requests are watched before something is said of them.
	watchTime = 1200 * time.Millisecond
)

// story is the demo as it goes on.
type story struct {
	cfg   Config
	page  *page
	began time.Time

	lab        *lab.Lab
	link       *lab.Capture // of the link between the nodes
	web, batch *app
	db         *app
	vip        netip.AddrPort // of the service db
	mariaDB    *mariaDB       // nil where it is not installed
	withUDP    bool           // the kernel can capture it

	fail     context.CancelCauseFunc // ends the step that is on
	watchers sync.WaitGroup

	denied  time.Time // when the policy came into force; zero before
	plainly measurement
	meshed  measurement
}

// app is an application in its pod.
type app struct {
	*control
	pod     *lab.Pod
	process *lab.Process
}

// build makes the cluster. What it made is removed by clear, also after an error.
func (s *story) build(ctx context.Context) error {
	l, err := lab.New(ctx, lab.Options{
		Name: newName(), IPv6: s.cfg.IPv6, BinDir: filepath.Dir(s.cfg.Program), Keep: s.cfg.Keep,
	})
	if err != nil {
		return err
	}
	s.lab = l
	if s.db, err = s.addApp(ctx, "db", 2, "server"); err != nil {
		return err
	}
	service, err := l.AddService(lab.ServiceSpec{
		Namespace: namespace, Name: "db", Ports: []lab.ServicePort{{Name: "mysql", Port: dbPort}},
	})
	if err != nil {
		return err
	}
	s.vip = netip.AddrPortFrom(service.VIPs[0], dbPort)
	if err := s.db.await(ctx, "served"); err != nil {
		return err
	}
	// There is no kube-proxy in the lab: before the mesh, a cluster IP leads nowhere.
	target := s.db.pod.AddrPort(dbPort).String()
	if s.web, err = s.addApp(ctx, "web", 1, "client", "--target", target); err != nil {
		return err
	}
	if s.batch, err = s.addApp(ctx, "batch", 1, "client", "--target", target); err != nil {
		return err
	}
	if s.link, err = l.Capture(ctx, l.Node(1)); err != nil {
		return err
	}
	return errors.Join(s.web.await(ctx, "report"), s.batch.await(ctx, "report"))
}

// addApp makes a pod whose service account has its name, and starts its application.
func (s *story) addApp(ctx context.Context, name string, node int, command string, args ...string) (*app, error) {
	pod, err := s.lab.AddPod(lab.PodSpec{Namespace: namespace, Name: name, Node: node, ServiceAccount: name})
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(s.lab.Dir(), name+".app")
	cmd := exec.Command(s.cfg.Program, append([]string{"demo", command, "--socket", socket}, args...)...)
	process, err := pod.Start(cmd)
	if err != nil {
		return nil, err
	}
	s.watchProcess(ctx, name, process)
	return &app{newControl(name, socket), pod, process}, nil
}

// await waits until the application answers.
func (a *app) await(ctx context.Context, question string) error {
	return until(ctx, func(ctx context.Context) error {
		var answer any
		return a.ask(ctx, question, struct{}{}, &answer)
	})
}

// startMesh starts the real CA and the real agents. Their access logs go to files of their own.
func (s *story) startMesh(ctx context.Context) error {
	ca, err := s.lab.StartCA(ctx)
	if err != nil {
		return err
	}
	s.watchProcess(ctx, "raceway-ca", ca.Process)
	for _, n := range s.lab.Nodes() {
		accessLog := filepath.Join(s.lab.Dir(), "log", "access-"+n.Name+".txt")
		agent, err := s.lab.StartAgent(ctx, n, "--access-log", accessLog)
		if err != nil {
			return err
		}
		s.watchProcess(ctx, "raceway-agent on "+n.Name, agent.Process)
	}
	return nil
}

// sockets are those of the agents, as RACEWAY_AGENT wants them.
func (s *story) sockets() []string {
	var all []string
	for _, n := range s.lab.Nodes() {
		all = append(all, s.lab.Agent(n).Socket)
	}
	return all
}

// raceway runs the command line itself and shows what it prints.
func (s *story) raceway(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, s.cfg.Program, args...)
	cmd.Env = append(os.Environ(), "RACEWAY_AGENT="+strings.Join(s.sockets(), ","))
	output, err := cmd.CombinedOutput()
	s.page.command("raceway "+strings.Join(args, " "), string(output))
	if err != nil {
		return fmt.Errorf("raceway %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// report asks a client what it went through since a time.
func (s *story) report(ctx context.Context, a *app, since time.Time) (clientReport, error) {
	var r clientReport
	return r, a.ask(ctx, "report", reportQuestion{since}, &r)
}

// open makes a client open a connection that stays.
func (s *story) open(ctx context.Context, a *app, name string, target netip.AddrPort) error {
	var r lastingReport
	return a.ask(ctx, "open", connectionQuestion{name, target}, &r)
}

// closeConnection makes a client close one that stays.
func (s *story) closeConnection(ctx context.Context, a *app, name string) error {
	var r lastingReport
	return a.ask(ctx, "close", connectionQuestion{Name: name}, &r)
}

// watch lets a client make requests for a while and returns them.
func (s *story) watch(ctx context.Context, a *app) ([]request, error) {
	since := time.Now()
	if err := sleep(ctx, watchTime); err != nil {
		return nil, err
	}
	r, err := s.report(ctx, a, since)
	if err == nil && len(r.Requests) == 0 {
		err = fmt.Errorf("%s made no request within %s", a.name, seconds(watchTime))
	}
	return r.Requests, err
}

// watchProcess fails the step that is on when a process ends that should not.
func (s *story) watchProcess(ctx context.Context, name string, p *lab.Process) {
	s.watchers.Go(func() {
		select {
		case <-ctx.Done():
		case <-p.Done():
			s.fail(fmt.Errorf("%s (process %d) ended by itself%s", name, p.Pid(), p.LogTail()))
		}
	})
}

// stillWell ends every step: no request failed that should not have,
// and every connection that is to last goes on.
func (s *story) stillWell(ctx context.Context) error {
	var lines []string
	for _, a := range []*app{s.web, s.batch} {
		r, err := s.report(ctx, a, s.began)
		if err != nil {
			return err
		}
		refused := 0
		for _, q := range r.Requests {
			if q.Error == "" {
				continue
			}
			if a == s.web || s.denied.IsZero() || q.At.Add(q.Took).Before(s.denied) {
				return fmt.Errorf("a request of %s failed, begun at %s: %s", a.name, q.At.Format("15:04:05.000"), q.Error)
			}
			refused++
		}
		for name, l := range r.Lasting {
			if l.Error != "" && (a == s.web || s.denied.IsZero()) {
				return fmt.Errorf("the connection of %s from %s broke: %s", a.name, name, l.Error)
			}
		}
		what := "0 failed"
		if refused > 0 {
			what = fmt.Sprintf("%d refused by the policy, 0 failed otherwise", refused)
		}
		lines = append(lines, fmt.Sprintf("%s %d requests, %s", a.name, r.Count, what))
	}
	s.page.note("so far: %s", strings.Join(lines, "; "))
	return nil
}

// errorsOf counts failed requests, and returns the first failure.
func errorsOf(requests []request) (failed int, first string) {
	for _, r := range requests {
		if r.Error != "" {
			failed++
			if first == "" {
				first = r.Error
			}
		}
	}
	return failed, first
}

// until repeats probe until it succeeds or patience ends.
func until(ctx context.Context, probe func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %v", patience))
	defer cancel()
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// cause is the last part of an error, without the addresses of this one connection.
func cause(text string) string {
	parts := strings.Split(text, ": ")
	return parts[len(parts)-1]
}

func seconds(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}

// newName is short, because unix socket paths are.
func newName() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return namePrefix + strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))[:5]
}
