package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

func TestMistakesGetOneLineThatHelps(t *testing.T) {
	one, two, none := oneNode(t), twoNodes(t), t.TempDir()
	for _, test := range []struct {
		line string
		dir  string
		code int
		says string
	}{
		{"workload", two, 2, `there are several agents here (n1, n2): choose with --agent n1, or --agent all`},
		{"workloads", none, 3, "no agent socket in " + none + ": is raceway-agent running on this node?"},
		{"workloads", filepath.Join(none, "missing"), 3, "is raceway-agent running on this node?"},
		{"workloads --agent n3", two, 2, `there is no agent of node "n3" in ` + two + `, only of n1, n2`},
		{"workloads --agent ./none.sock", two, 3, "no agent socket at ./none.sock"},
		{"workloads --agent n1,,n2", two, 2, "--agent is empty"},
		{"workloads extra", one, 2, `takes no arguments, but there is "extra"`},
		{"workloads -o xml", one, 2, "it is one of table, wide, json, yaml"},
		{"workloads --namspace x", one, 2, `unknown flag: --namspace: run "raceway workloads -h" for the flags it has`},
		{"worklods", one, 2, `there is no command "worklods": did you mean "workloads"?`},
		{"frobnicate", one, 2, `there is no command "frobnicate": run "raceway -h" for the list`},
		{"why web", one, 2, `as in "raceway why web db:3306": there are 1 arguments`},
		{"why wbe db:3306", one, 2, "there is no pod wbe in the cluster: did you mean shop/deployment/web"},
		{"why web db", one, 2, `destination "db" is not host:port`},
		{"why wbe db:3306", two, 2, "there is no pod wbe in the cluster: did you mean shop/deployment/web"},
		{"log-level loud", one, 2, `"loud" is not a log level: it is debug, info, warn or error`},
		{"log-level debug info", one, 2, "takes one level"},
		{"check", one, 1, "1 of 6 checks failed"},
	} {
		t.Run(test.line, func(t *testing.T) {
			code, _, stderr := raceway(t, test.dir, strings.Fields(test.line)...)
			if code != test.code || !strings.HasPrefix(stderr, "raceway: ") || !strings.Contains(stderr, test.says) {
				t.Errorf("exit code %d with %q, want %d with %q", code, stderr, test.code, test.says)
			}
			if strings.Count(stderr, "\n") != 1 {
				t.Errorf("the error is not one line: %q", stderr)
			}
		})
	}
}

func TestAgentIsChosenByFlagThenByEnvironment(t *testing.T) {
	dir := twoNodes(t)
	nodeOf := func(env string, args ...string) string {
		t.Helper()
		term := newTerminal(dir)
		term.agentEnv = env
		if code := term.run(t.Context(), append([]string{"certificates", "--no-headers"}, args...)); code != exitOK {
			t.Fatal(term.stderr.String())
		}
		out := term.stdout.String()
		n1, n2 := strings.Contains(out, "/sa/web"), strings.Contains(out, "/sa/db")
		return map[[2]bool]string{{true, false}: "n1", {false, true}: "n2", {true, true}: "both"}[[2]bool{n1, n2}]
	}
	socket := filepath.Join(dir, "n2.sock")
	for _, test := range []struct {
		env  string
		args []string
		want string
	}{
		{"", []string{"--agent", "n1"}, "n1"},
		{"", []string{"--agent", socket}, "n2"},
		{"", []string{"--agent", "n1", "--agent", "n2"}, "both"},
		{"", []string{"--agent", "n1,n1"}, "n1"},
		{"", []string{"--agent", "all", "--agent", socket}, "both"},
		{"n2", nil, "n2"},
		{"n1,n2", nil, "both"},
		{"n2", []string{"--agent", "n1"}, "n1"},
	} {
		if got := nodeOf(test.env, test.args...); got != test.want {
			t.Errorf("env %q with %q asks %s, want %s", test.env, test.args, got, test.want)
		}
	}
}

func TestOneDeadAgentDoesNotHideTheOthers(t *testing.T) {
	dir := oneNode(t)
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "n0.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := raceway(t, dir, "workloads", "--agent", "all")
	if code != exitAgent || !strings.Contains(stdout, "web-7d4b9c") || !strings.Contains(stderr, "agent n0: nobody listens at") {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}
}

func TestErrorOfTheAgentIsShown(t *testing.T) {
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", &admintest.Backend{Err: errors.New("read map pods: bad file descriptor")})
	code, _, stderr := raceway(t, dir, "workloads")
	if code != exitAgent || stderr != "raceway: read map pods: bad file descriptor\n" {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

func TestDirectoryThatCannotBeReadAsksForRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root reads every directory")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := raceway(t, dir, "workloads"); code != exitAgent || !strings.Contains(stderr, "run this as root") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

func TestWhyIsAnsweredByTheSourcesNode(t *testing.T) {
	dir := twoNodes(t)
	for src, node := range map[string]string{"web": `"n1"`, "db-0": `"n2"`} {
		code, stdout, stderr := raceway(t, dir, "why", src, "shop/db:3306", "-o", "json")
		if code != exitOK || !strings.Contains(stdout, `"node": `+node) {
			t.Errorf("why %s = %d %s %s, want the agent of %s", src, code, stdout, stderr, node)
		}
	}
}

func TestLogLevelIsChangedOnEveryAgent(t *testing.T) {
	dir := twoNodes(t)
	code, stdout, stderr := raceway(t, dir, "log-level", "debug", "--agent", "all", "--no-headers")
	if code != exitOK || strings.Join(strings.Fields(stdout), " ") != "n1 DEBUG n2 DEBUG" {
		t.Fatalf("exit code %d, %q, %q", code, stdout, stderr)
	}
	c := admin.NewClient(filepath.Join(dir, "n2.sock"))
	defer c.Close()
	if level, err := c.LogLevel(t.Context()); err != nil || level.String() != "DEBUG" {
		t.Errorf("the agent's level is %v, %v", level, err)
	}
}
