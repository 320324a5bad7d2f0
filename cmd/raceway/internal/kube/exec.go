package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
)

// PipeVerb is the verb of raceway that joins its standard input and output to the admin
// socket of the agent beside it.
const PipeVerb = "admin-pipe"

// Dial connects to the admin API of an agent, through a command that runs inside its pod. The
// connection ends with ctx.
func (c *Cluster) Dial(ctx context.Context, a Agent) (net.Conn, error) {
	if a.Trouble != "" {
		return nil, fmt.Errorf("pod %s/%s does not run: %s", c.Namespace, a.Pod, a.Trouble)
	}
	return c.exec(ctx, container{c.Namespace, a.Pod, agentContainer}, "raceway", PipeVerb)
}

// container is one of a pod.
type container struct{ namespace, pod, name string }

// exec runs a command, joined to its input and output until Close. Read says why it failed.
func (c *Cluster) exec(ctx context.Context, in container, command ...string) (net.Conn, error) {
	executor, err := c.executor(in, command...)
	if err != nil {
		return nil, err
	}
	near, far := net.Pipe()
	// client-go would tell the terminal of every connection that is closed at the end.
	ctx = klog.NewContext(context.WithoutCancel(ctx), logr.Discard())
	ctx, cancel := context.WithCancel(ctx)
	conn := &execConn{Conn: near, cancel: cancel, pod: in.namespace + "/" + in.pod, ended: make(chan struct{})}
	go func() {
		var complaint bytes.Buffer
		err := executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: far, Stdout: far, Stderr: &complaint})
		conn.end(err, complaint.String())
		_ = far.Close() // a pipe's end always closes
	}()
	return conn, nil
}

// executor prefers a WebSocket (Kubernetes 1.31 and later take it) to SPDY, as kubectl does.
func (c *Cluster) executor(in container, command ...string) (remotecommand.Executor, error) {
	request := c.client.CoreV1().RESTClient().Post().Namespace(in.namespace).Resource("pods").Name(in.pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: in.name, Command: command, Stdin: true, Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	spdy, err := remotecommand.NewSPDYExecutor(c.config, "POST", request.URL())
	if err != nil {
		return nil, fmt.Errorf("exec in pod %s/%s: %w", in.namespace, in.pod, err)
	}
	socket, err := remotecommand.NewWebSocketExecutor(c.config, "GET", request.URL().String())
	if err != nil {
		return nil, fmt.Errorf("exec in pod %s/%s: %w", in.namespace, in.pod, err)
	}
	return remotecommand.NewFallbackExecutor(socket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
}

// execConn is the near end of a command's standard input and output.
type execConn struct {
	net.Conn
	cancel context.CancelFunc
	pod    string
	ended  chan struct{}
	err    error // why the command ended, once ended is closed
}

func (c *execConn) end(err error, complaint string) {
	if complaint = strings.TrimSpace(complaint); complaint != "" {
		err = errors.New(complaint)
	}
	if err != nil {
		c.err = fmt.Errorf("exec in pod %s: %w", c.pod, err)
	}
	close(c.ended)
}

// Read says why the command ended, rather than that it did.
func (c *execConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return n, c.why(err)
}

// Write does so too: which of both notices first is chance.
func (c *execConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	return n, c.why(err)
}

func (c *execConn) why(err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-c.ended:
		if c.err != nil {
			return c.err
		}
	default:
	}
	return err
}

// Close ends the command.
func (c *execConn) Close() error {
	err := c.Conn.Close()
	c.cancel()
	return err
}
