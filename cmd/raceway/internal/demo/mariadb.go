package demo

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// mariaDB is where the real thing is installed.
type mariaDB struct {
	server, installer, client string
}

// findMariaDB looks for the server, its installer and the client. Distributions keep the
// server off the PATH.
func findMariaDB(required bool) (*mariaDB, error) {
	var m mariaDB
	var lacking []string
	for _, program := range []struct {
		path *string
		name string
	}{{&m.server, "mariadbd"}, {&m.installer, "mariadb-install-db"}, {&m.client, "mariadb"}} {
		if *program.path = findProgram(program.name); *program.path == "" {
			lacking = append(lacking, program.name)
		}
	}
	switch {
	case len(lacking) == 0:
		return &m, nil
	case required:
		return nil, &MissingError{[]string{strings.Join(lacking, ", ") + ", because of --mariadb: install MariaDB (on Debian and Ubuntu: apt-get install mariadb-server)"}}
	}
	return nil, nil
}

func findProgram(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/usr/libexec", "/usr/local/sbin", "/usr/local/bin", "/usr/local/mysql/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

const (
	mariaUser     = "web"
	mariaPassword = "open sesame"
)

// serverFirst shows a protocol in which the client waits for the server: a proxy that waits
// for the client's first bytes would hang.
func (s *story) serverFirst(ctx context.Context) error {
	p := s.page
	if s.mariaDB == nil {
		p.say("In the protocols of databases and mail, the client says nothing until the server has greeted it. So does db:")
		if err := s.showGreeting(ctx); err != nil {
			return err
		}
		p.note("with MariaDB installed (on Debian and Ubuntu: apt-get install mariadb-server) this step uses the real one; --mariadb insists on it")
		return nil
	}
	p.say("A database greets its client before that says a word. So a real MariaDB starts in a new pod on node2, which is enrolled as it comes, and web uses it:")
	vip, err := s.startMariaDB(ctx)
	if err != nil {
		return err
	}
	return s.queryMariaDB(ctx, vip)
}

func (s *story) showGreeting(ctx context.Context) error {
	var r request
	if err := s.web.ask(ctx, "request", connectionQuestion{Target: s.vip}, &r); err != nil {
		return err
	}
	if r.Error != "" {
		return fmt.Errorf("a request to the service db failed: %s", r.Error)
	}
	if r.Seen.Addr() != s.web.pod.Addr() {
		return fmt.Errorf("the server greets %s, and not web's address %s", r.Seen.Addr(), s.web.pod.Addr())
	}
	s.page.block(fmt.Sprintf("◄── hello %s, this is db\n%s ──►\n◄── done %s", r.Seen, payment(r.Nonce), r.Nonce))
	s.page.good("the server spoke first, through the tunnel, to web's real address; %s in all", micros(r.Took))
	return nil
}

// startMariaDB starts a server in a pod of its own and returns its service's address.
func (s *story) startMariaDB(ctx context.Context) (netip.AddrPort, error) {
	pod, err := s.lab.AddPod(lab.PodSpec{Namespace: namespace, Name: "mariadb", Node: 2, ServiceAccount: "mariadb"})
	if err != nil {
		return netip.AddrPort{}, err
	}
	service, err := s.lab.AddService(lab.ServiceSpec{
		Namespace: namespace, Name: "mariadb", Ports: []lab.ServicePort{{Name: "mysql", Port: dbPort}},
	})
	if err != nil {
		return netip.AddrPort{}, err
	}
	server, err := s.mariaDB.start(ctx, pod, filepath.Join(s.lab.Dir(), "mariadb"))
	if err != nil {
		return netip.AddrPort{}, err
	}
	s.watchProcess(ctx, "mariadbd", server)
	if err := s.awaitCapture(ctx, dataplane.ProtocolHBONE, dataplane.CaptureInForce, pod); err != nil {
		return netip.AddrPort{}, err
	}
	err = until(ctx, func(ctx context.Context) error {
		conn, err := pod.Dial(ctx, pod.AddrPort(dbPort))
		if err != nil {
			return fmt.Errorf("mariadbd does not listen yet: %w", err)
		}
		return conn.Close()
	})
	return netip.AddrPortFrom(service.VIPs[0], dbPort), err
}

// start makes a small database in dir and serves it in the pod.
func (m *mariaDB) start(ctx context.Context, pod *lab.Pod, dir string) (*lab.Process, error) {
	account, err := m.account(dir)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	small := []string{
		"--datadir=" + data, "--user=" + account,
		"--innodb-log-file-size=4M", "--innodb-buffer-pool-size=8M", "--innodb-data-file-path=ibdata1:10M:autoextend",
	}
	install := append([]string{"--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"}, small...)
	if output, err := pod.Exec(ctx, m.installer, install...); err != nil {
		return nil, fmt.Errorf("%w: %s", err, output)
	}
	serve := append([]string{
		"--no-defaults", "--init-file=" + filepath.Join(dir, "init.sql"), "--socket=" + filepath.Join(dir, "sock"),
		"--pid-file=" + filepath.Join(dir, "pid"), "--port=" + strconv.Itoa(dbPort), "--bind-address=*", "--skip-name-resolve",
	}, small...)
	return pod.Start(exec.Command(m.server, serve...))
}

// account makes the directory for MariaDB and returns the user that it runs as: its own
// where its package made one.
func (m *mariaDB) account(dir string) (string, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", fmt.Errorf("make MariaDB's directory: %w", err)
	}
	const initSQL = `CREATE DATABASE shop;
CREATE TABLE shop.orders (id INT PRIMARY KEY, amount DECIMAL(8,2));
INSERT INTO shop.orders VALUES (1, 42.00), (2, 17.50);
CREATE USER '` + mariaUser + `'@'%' IDENTIFIED BY '` + mariaPassword + `';
GRANT ALL ON shop.* TO '` + mariaUser + `'@'%';
`
	if err := os.WriteFile(filepath.Join(dir, "init.sql"), []byte(initSQL), 0o644); err != nil {
		return "", fmt.Errorf("write MariaDB's first tables: %w", err)
	}
	own, err := user.Lookup("mysql")
	if err != nil {
		return "root", nil // which it accepts only when it is told to
	}
	uid, err := strconv.Atoi(own.Uid)
	if err == nil {
		err = os.Chown(dir, uid, -1)
	}
	if err != nil {
		return "", fmt.Errorf("give MariaDB's directory to its user: %w", err)
	}
	return own.Username, nil
}

func (s *story) queryMariaDB(ctx context.Context, vip netip.AddrPort) error {
	const query = "SELECT VERSION() AS server, SUBSTRING_INDEX(USER(), '@', -1) AS client, COUNT(*) AS orders, SUM(amount) AS amount FROM orders"
	start := time.Now()
	output, err := s.web.pod.Exec(ctx, s.mariaDB.client, "--no-defaults", "--protocol=tcp", "--table",
		"--host="+vip.Addr().String(), "--port="+strconv.Itoa(dbPort), "--user="+mariaUser, "--password="+mariaPassword,
		"--execute="+query, "shop")
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(output)))
	}
	s.page.command("mariadb -h "+vip.Addr().String()+" -u "+mariaUser+" -p shop -e \"SELECT …\"", string(output))
	if !strings.Contains(string(output), " "+s.web.pod.Addr().String()+" ") {
		return fmt.Errorf("MariaDB does not see web's address, %s", s.web.pod.Addr())
	}
	s.page.good("MariaDB spoke first, through the tunnel, and sees web's real address; start to end of its client took %s", seconds(time.Since(start)))
	return nil
}
