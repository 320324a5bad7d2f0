package main

import (
	"strings"
	"testing"
)

func TestCompletion(t *testing.T) {
	dir := twoNodes(t)
	for _, test := range []struct {
		line []string
		want string
	}{
		{[]string{"why", ""}, "legacy/old shop/batch shop/db-0 shop/web-7d4b9c"},
		{[]string{"why", "shop/w"}, "shop/web-7d4b9c"},
		{[]string{"-n", "legacy", "why", ""}, "legacy/old"},
		{[]string{"why", "web", ""}, "cache.shop:16379 cache.shop:6379 db.shop:3306 mail.legacy:25"},
		{[]string{"why", "web", "db:3306", ""}, ""},
		{[]string{"workloads", "--agent", ""}, "n1 n2 all"},
		{[]string{"workloads", "-o", ""}, "table wide json yaml"},
		{[]string{"workloads", "-n", ""}, "legacy shop"},
		{[]string{"log-level", ""}, "debug info warn error"},
		{[]string{"workl"}, "workloads"},
	} {
		code, stdout, stderr := raceway(t, dir, append([]string{"__completeNoDesc"}, test.line...)...)
		offers := ""
		if end := strings.LastIndex(stdout, "\n:"); end >= 0 {
			offers = stdout[:end]
		}
		if got := strings.Join(strings.Fields(offers), " "); code != exitOK || got != test.want {
			t.Errorf("%q offers %q (%d, %s), want %q", test.line, got, code, stderr, test.want)
		}
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, stdout, stderr := raceway(t, t.TempDir(), "completion", shell); code != exitOK || !strings.Contains(stdout, "raceway") {
			t.Errorf("completion %s = %d, %s", shell, code, stderr)
		}
	}
}
