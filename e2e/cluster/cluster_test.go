package cluster_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/cluster"
	"github.com/raceway-mesh/raceway/e2e/cluster/clustertest"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// apps are a server on each node, with a probe of each kind and a client beside it.
func apps() string {
	const server = `---
apiVersion: v1
kind: Pod
metadata: {name: server%[1]d, labels: {app: server}}
spec:
  nodeName: node%[1]d
  terminationGracePeriodSeconds: 3
  containers:
  - name: app
    image: %[2]s
    args: [serve]
    env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
    livenessProbe: {grpc: {port: 9090}, periodSeconds: 1}
    startupProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}
  - name: client
    image: %[2]s
    args: [hold, "127.0.0.1:9000"]
    readinessProbe: {exec: {command: [/bin/app, check]}, periodSeconds: 1, timeoutSeconds: 3}
`
	return fmt.Sprintf(server, 1, cluster.AppRef) + fmt.Sprintf(server, 2, cluster.AppRef) + `---
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {ipFamilyPolicy: PreferDualStack, selector: {app: server}, type: NodePort, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec: {ipFamilyPolicy: PreferDualStack, selector: {app: server}, clusterIP: None, ports: [{port: 8080}]}
`
}

func kubectl(t *testing.T, c *cluster.Cluster, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// start starts a cluster and the apps on it, and waits until every probe has passed.
func start(t *testing.T, config cluster.Config) *cluster.Cluster {
	t.Helper()
	c := clustertest.Start(t, config)
	if err := c.LoadApp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Apply(t.Context(), apps()); err != nil {
		t.Fatal(err)
	}
	kubectl(t, c, "wait", "--for=condition=Ready", "pod/server1", "pod/server2", "--timeout=60s")
	return c
}

// get requests url from the server on a node. A service may take a moment to get where its
// endpoints are.
func get(t *testing.T, c *cluster.Cluster, node int, url string) (answer struct{ Pod, Node, Peer, Path string }) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		out, err := c.Kubectl(t.Context(), "exec", fmt.Sprintf("server%d", node), "-c", "client", "--", "/bin/app", "get", url)
		if err == nil {
			err = json.Unmarshal([]byte(out), &answer)
		}
		if err == nil {
			return answer
		}
		if time.Now().After(deadline) {
			t.Fatalf("get %s: %v", url, err)
		}
	}
}

func podAddr(t *testing.T, c *cluster.Cluster, pod string) string {
	t.Helper()
	addr := kubectl(t, c, "get", "pod", pod, "-o", "jsonpath={.status.podIP}")
	if strings.Contains(addr, ":") {
		return "[" + addr + "]"
	}
	return addr
}

// reach uses every way to a server that Kubernetes has.
func reach(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	ip := kubectl(t, c, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}")
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	for _, url := range []string{
		"http://" + ip + "/", "http://server/", "http://server.default.svc.cluster.local/", "http://headless:8080/",
	} {
		get(t, c, 1, url)
	}
	if got := get(t, c, 1, "http://"+podAddr(t, c, "server2")+":8080/"); got.Node != "node2" {
		t.Errorf("server2 says that it is on %s", got.Node)
	}
}

func TestPodsTalkAcrossNodes(t *testing.T) {
	c := start(t, cluster.Config{})
	capture, err := c.Node(2).Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer capture.Close()
	reach(t, c)
	get(t, c, 1, "http://"+podAddr(t, c, "server2")+":8080/a-needle")
	if found, err := capture.Contains(t.Context(), []byte("/a-needle")); err != nil || !found {
		t.Errorf("a plain request between the nodes was not captured: %v", err)
	}
	nodePort := "http://" + c.Node(2).Addrs[0].String() + ":30080/"
	if got := get(t, c, 1, nodePort); got.Pod == "" {
		t.Errorf("%s: nobody answers", nodePort)
	}
	if logs := kubectl(t, c, "logs", "server2", "-c", "app"); !strings.Contains(logs, "serving") {
		t.Errorf("logs of server2: %q", logs)
	}

	t.Run("a kubelet has a cgroup of its own", func(t *testing.T) { testKubeletCgroup(t, c) })
	t.Run("an API server comes back", func(t *testing.T) { testAPIServerStops(t, c) })
	t.Run("a node comes back from its disk", func(t *testing.T) { testReboot(t, c) })
}

func testKubeletCgroup(t *testing.T, c *cluster.Cluster) {
	found := make(map[string][]string)
	for _, process := range []string{"kubelet", "containerd", "app"} {
		pids, err := c.Node(1).Exec(t.Context(), "pgrep", "-x", process)
		if err != nil {
			t.Fatal(err)
		}
		for _, pid := range strings.Fields(string(pids)) {
			cgroup, err := os.ReadFile(c.Node(1).Path("/proc/" + pid + "/cgroup"))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(cgroup)) {
				if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
					found[process] = append(found[process], path)
				}
			}
		}
	}
	if len(found["kubelet"]) != 1 || !strings.HasSuffix(found["kubelet"][0], "/kubelet") {
		t.Errorf("the kubelet is in %q, want one cgroup of its own", found["kubelet"])
	}
	for _, process := range []string{"containerd", "app"} {
		for _, path := range found[process] {
			if path == found["kubelet"][0] {
				t.Errorf("%s is in the kubelet's cgroup", process)
			}
		}
	}
}

func testAPIServerStops(t *testing.T, c *cluster.Cluster) {
	if err := c.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl(t.Context(), "get", "nodes", "--request-timeout=2s"); err == nil {
		t.Error("kubectl gets an answer from an API server that is stopped")
	}
	if err := c.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.AwaitNodes(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach(t, c)
}

// testReboot also proves that the disk is kept and that the rest is not.
func testReboot(t *testing.T, c *cluster.Cluster) {
	n := c.Node(2)
	bootID := func() string {
		id, err := n.Exec(t.Context(), "cat", "/proc/sys/kernel/random/boot_id")
		if err != nil {
			t.Fatal(err)
		}
		return string(id)
	}
	for _, file := range []string{"/etc/cni/net.d/kept", "/run/lost", "/sys/fs/bpf/lost"} {
		if out, err := n.Exec(t.Context(), "mkdir", file); err != nil {
			t.Fatal(err, out)
		}
	}
	before := bootID()
	if err := c.StopNode(n); err != nil {
		t.Fatal(err)
	}
	if err := c.StartNode(n); err != nil {
		t.Fatal(err)
	}
	// The API server still believes in the node as it was: only the pod knows.
	kubectl(t, c, "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "pod/server2", "--timeout=90s")
	kubectl(t, c, "wait", "--for=condition=Ready", "pod/server2", "--timeout=60s")
	reach(t, c)
	if bootID() == before {
		t.Error("the boot id is that of the last boot")
	}
	for _, file := range []string{"/run/lost", "/sys/fs/bpf/lost"} {
		if _, err := os.Stat(n.Path(file)); err == nil {
			t.Errorf("%s has outlived the reboot", file)
		}
	}
	if _, err := os.Stat(n.Path("/etc/cni/net.d/kept")); err != nil {
		t.Errorf("the disk was lost: %v", err)
	}
}

func TestFamilies(t *testing.T) {
	for _, families := range []cluster.IPFamilies{cluster.IPv6, cluster.DualStack} {
		t.Run(families.String(), func(t *testing.T) {
			c := start(t, cluster.Config{IPFamilies: families})
			reach(t, c)
			if families != cluster.DualStack {
				return
			}
			ips := strings.Fields(kubectl(t, c, "get", "service", "server", "-o", "jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}"))
			if len(ips) != 2 {
				t.Fatalf("a service of both families has %q", ips)
			}
			get(t, c, 1, "http://["+ips[1]+"]/")
		})
	}
}

func TestMariaDBServes(t *testing.T) {
	c := clustertest.Start(t, cluster.Config{Nodes: 1})
	if err := c.LoadMariaDB(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Apply(t.Context(), cluster.MariaDBPod("db", nil)); err != nil {
		t.Fatal(err)
	}
	kubectl(t, c, "wait", "--for=condition=Ready", "pod/db", "--timeout=60s")
	got := kubectl(t, c, "exec", "db", "--", "mariadb", "--host="+podAddr(t, c, "db"), "--batch", "--skip-column-names", "--execute=SELECT 6*7")
	if got != "42" {
		t.Errorf("SELECT 6*7 is %q", got)
	}
}

// victimEnv makes this test's binary a process that starts a cluster and waits to be killed.
const victimEnv = "RACEWAY_CLUSTER_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) == "" {
		os.Exit(m.Run())
	}
	if _, err := cluster.Start(context.Background(), cluster.Config{}); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("up")
	select {}
}

func TestNothingOutlivesItsMaker(t *testing.T) {
	clustertest.Require(t)
	victim := exec.Command(os.Args[0])
	victim.Env = append(os.Environ(), victimEnv+"=1")
	out, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 2)
	if n, err := out.Read(said); string(said[:n]) != "up" {
		t.Fatalf("the victim says %q (%v)", said[:n], err)
	}
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait() // it was killed
	deadline := time.Now().Add(20 * time.Second)
	for alive := processes(t); len(alive) > 0; alive = processes(t) {
		if time.Now().After(deadline) {
			t.Fatalf("outlived their maker: %q", alive)
		}
		time.Sleep(50 * time.Millisecond)
	}
	found, err := cluster.Clean(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Error("a killed process left nothing: was there a cluster?")
	}
	for _, left := range cluster.Leftovers() {
		t.Error("left behind:", left)
	}
}

// processes are the commands that run in the cluster's cgroups.
func processes(t *testing.T) []string {
	t.Helper()
	var alive []string
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		// What cannot be read has just ended.
		cgroup, err := os.ReadFile(f)
		if err != nil || !strings.Contains(string(cgroup), "/raceway-cluster/") {
			continue
		}
		dir := filepath.Dir(f)
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			t.Fatal(err)
		}
		running, err := lab.Running(pid)
		if err != nil {
			t.Fatal(err)
		}
		if command, err := os.ReadFile(filepath.Join(dir, "comm")); err == nil && running {
			alive = append(alive, strings.TrimSpace(string(command)))
		}
	}
	return alive
}

func TestAStartThatFailsLeavesNothing(t *testing.T) {
	clustertest.Require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	if c, err := cluster.Start(ctx, cluster.Config{}); err == nil {
		t.Error("a cluster was up in 4 seconds: make this test's timeout shorter", c.Close())
	}
	for _, left := range cluster.Leftovers() {
		t.Error("left behind:", left)
	}
	if alive := processes(t); len(alive) > 0 {
		t.Errorf("left behind: %q", alive)
	}
}
