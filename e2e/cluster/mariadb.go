package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/raceway-mesh/raceway/e2e/cluster/image"
)

// MariaDBRef is the image of a MariaDB server and its client, which are this machine's.
const MariaDBRef = "images.test/mariadb:1"

// ErrNoMariaDB says that this machine has none.
var ErrNoMariaDB = errors.New("no MariaDB on this machine: apt-get install mariadb-server-core mariadb-client-core")

// LoadMariaDB gives the nodes MariaDBRef. Its commands are mariadbd and mariadb; data belongs
// into /data, which everybody may write.
func (c *Cluster) LoadMariaDB(ctx context.Context) error {
	files := make(map[string]string)
	for _, program := range []string{"/usr/sbin/mariadbd", "/usr/bin/mariadb"} {
		if _, err := exec.LookPath(program); err != nil {
			return ErrNoMariaDB
		}
		files[program] = program
		libraries, err := librariesOf(ctx, program)
		if err != nil {
			return err
		}
		for _, l := range libraries {
			files[l] = l
		}
	}
	// The server's messages and character sets.
	for _, dir := range []string{"/usr/share/mysql/english", "/usr/share/mysql/charsets"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files[path] = path
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("find MariaDB's files: %w", err)
		}
	}
	tar := filepath.Join(stateDir, "images", "mariadb.tar")
	err := image.Write(tar, image.Spec{
		Ref: MariaDBRef, Files: files, Dirs: []string{"/data", "/tmp", "/run/mysqld"},
		Text: map[string]string{
			"/etc/passwd": "root:x:0:0::/:/bin/false\nmysql:x:999:999::/data:/bin/false\n",
			"/etc/group":  "root:x:0:\nmysql:x:999:\n",
		},
		User: "999:999",
	})
	if err != nil {
		return err
	}
	return c.LoadImage(ctx, tar)
}

// MariaDBPod is a pod that serves MariaDB to everybody, once LoadMariaDB has run. Its label
// app is its name.
func MariaDBPod(name string, labels map[string]string) string {
	all := map[string]string{"app": name}
	maps.Copy(all, labels)
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: %s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: mariadb
    image: %s
    command: [mariadbd, --no-defaults, --datadir=/data, --skip-grant-tables, --socket=/run/mysqld/mysqld.sock, --innodb-buffer-pool-size=8M]
    ports: [{containerPort: 3306}]
    readinessProbe: {exec: {command: [mariadb, --no-defaults, --socket=/run/mysqld/mysqld.sock, --execute=SELECT 1]}, periodSeconds: 1, timeoutSeconds: 5}
`, name, inYAML(all), MariaDBRef)
}

// inYAML is JSON, which YAML is a superset of.
func inYAML(labels map[string]string) string {
	pairs := make([]string, 0, len(labels))
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		pairs = append(pairs, fmt.Sprintf("%q: %q", k, labels[k]))
	}
	return "{" + strings.Join(pairs, ", ") + "}"
}

// librariesOf lists what the dynamic linker loads for a program, itself included.
func librariesOf(ctx context.Context, program string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", program).Output()
	if err != nil {
		return nil, fmt.Errorf("find the libraries of %s: %w", program, err)
	}
	var found []string
	for line := range strings.Lines(string(out)) {
		for _, field := range strings.Fields(line) {
			if strings.HasPrefix(field, "/") {
				found = append(found, field)
			}
		}
	}
	return found, nil
}
