package explain_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/explain"
)

func TestNamesThatPeopleUse(t *testing.T) {
	for _, test := range []struct{ src, dst, source, destination string }{
		{"cron", "db:3306", "shop/cron", "shop/db:3306"},
		{"deploy/old", "db.shop:3306", "legacy/old", "shop/db:3306"},
		{"Deployment/old", "db.shop.svc:3306", "legacy/old", "shop/db:3306"},
		{"shop/deploy/web", "db.shop.svc.cluster.local:3306", "shop/web", "shop/db:3306"},
		{"pod/cron", "db.shop.svc.cluster.local.:3306", "shop/cron", "shop/db:3306"},
		{"sts/db", "DB:mysql", "shop/db-0", "shop/db:3306"},
		{"db", "svc/db:3306", "shop/db-0", "shop/db:3306"},
		{"shop/web", "shop/svc/db:3306", "shop/web", "shop/db:3306"},
		{"shop/web", "db-1:3306", "shop/web", "shop/db-1:3306"},
		{"shop/web", "shop/db-1:3306", "shop/web", "shop/db-1:3306"},
		{"shop/web", "pod/db-1:3306", "shop/web", "shop/db-1:3306"},
		{"shop/web", "shop/sts/db:3306", "shop/web", "shop/db-0:3306"},
		{"10.1.1.2", "10.96.0.10:mysql", "shop/web", "shop/db:3306"},
		{"10.1.1.2", "10.1.2.4:3306", "shop/web", "shop/db-1:3306"},
		{"shop/web", "8.8.8.8:53", "shop/web", "8.8.8.8:53"},
		{"shop/web", "[2001:db8::1]:53", "shop/web", "[2001:db8::1]:53"},
	} {
		t.Run(test.src+" to "+test.dst, func(t *testing.T) {
			why, err := explain.Explain(newCluster().question(test.src, test.dst))
			if err != nil {
				t.Fatal(err)
			}
			if why.Source != test.source || why.Destination != test.destination {
				t.Errorf("got %s to %s, want %s to %s", why.Source, why.Destination, test.source, test.destination)
			}
		})
	}
}

func TestNamesThatLeadNowhere(t *testing.T) {
	for _, test := range []struct {
		src, dst string
		status   int
		says     string
	}{
		{"wbe", "db:3306", 404, "there is no pod wbe in the cluster: did you mean other/web, shop/web"},
		{"nginx", "db:3306", 404, "there is no pod nginx in the cluster: did you mean "},
		{"legacy/web", "db:3306", 404, "there is no pod web in namespace legacy: did you mean other/web, shop/web"},
		{"deploy/cron", "db:3306", 404, "there is no deployment cron in the cluster: did you mean "},
		{"web", "db:3306", 409, "web is ambiguous: did you mean other/web, shop/web?"},
		{"deploy/web", "db:3306", 409, "ambiguous: did you mean other/deployment/web, shop/deployment/web?"},
		{"migrate", "db:3306", 404, "pod shop/migrate has no traffic: it is Succeeded"},
		{"10.9.9.9", "db:3306", 404, "no pod has the address 10.9.9.9"},
		{"svc/db", "db:3306", 400, "is a service: name a pod"},
		{"", "db:3306", 400, "source is empty"},
		{"a/b/c/d", "db:3306", 400, "not a name"},
		{"shop//web", "db:3306", 400, "not a name"},
		{"shop/gadget/web", "db:3306", 400, "not a name"},
		{"old", "db:3306", 404, "there is no service or pod db in namespace legacy: did you mean shop/db"},
		{"cron", "dbb:3306", 404, "there is no service or pod dbb in namespace shop: did you mean shop/db"},
		{"cron", "svc/web:80", 404, "there is no service web in namespace shop"},
		{"cron", "db.nowhere.svc.cluster.local:3306", 404, "did you mean"},
		{"cron", "db", 400, "not host:port"},
		{"cron", "db:", 400, "not host:port"},
		{"cron", ":3306", 400, "not host:port"},
		{"cron", "[fd00::1]", 400, "not host:port"},
		{"cron", "[fd00::1:80", 400, "unclosed bracket"},
		{"cron", "fd00::1:80", 400, "in brackets"},
		{"cron", "db:0", 400, "service shop/db has no port \"0\": it has 3306 (mysql)"},
		{"cron", "db:http", 400, "service shop/db has no port \"http\": it has 3306 (mysql)"},
		{"cron", "10.1.2.3:65536", 400, "not a number from 1 to 65535"},
	} {
		t.Run(test.src+" to "+test.dst, func(t *testing.T) {
			_, err := explain.Explain(newCluster().question(test.src, test.dst))
			var answer *admin.Error
			if !errors.As(err, &answer) || answer.Status != test.status || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %d with %q", err, test.status, test.says)
			}
			if answer != nil && len(answer.Candidates) > 5 {
				t.Errorf("%d candidates are too many to read", len(answer.Candidates))
			}
		})
	}
}

func TestNamespaceOfTheQuestionSettlesABareName(t *testing.T) {
	q := newCluster().question("web", "db:3306")
	q.From = "shop"
	why, err := explain.Explain(q)
	if err != nil || why.Source != "shop/web" {
		t.Errorf("got %s, %v, want shop/web", why.Source, err)
	}
}

func TestPodOnTheAnsweringNodeStandsForItsOwner(t *testing.T) {
	c := newCluster()
	c.Workloads = append(c.Workloads, pod("shop", "db-2", "n1", "StatefulSet/db", "10.1.1.8"))
	why, err := explain.Explain(c.question("sts/db", "legacy/sink:80"))
	if err != nil || why.Source != "shop/db-2" {
		t.Errorf("got %s, %v, want shop/db-2, which runs here", why.Source, err)
	}
}

func TestNoViewOfTheClusterYet(t *testing.T) {
	q := newCluster().question("web", "db:3306")
	q.Snapshot = nil
	_, err := explain.Explain(q)
	var answer *admin.Error
	if !errors.As(err, &answer) || answer.Status != 503 {
		t.Errorf("got %v, want 503", err)
	}
}

func FuzzNames(f *testing.F) {
	f.Add("web", "db:3306")
	f.Add("shop/deploy/web", "[fd00::1]:80")
	f.Add("10.1.1.2", "db.shop.svc.cluster.local:mysql")
	c := newCluster()
	base := c.question("", "")
	f.Fuzz(func(t *testing.T, src, dst string) {
		q := base
		q.Source, q.Destination = src, dst
		why, err := explain.Explain(q)
		var answer *admin.Error
		switch {
		case err != nil && !errors.As(err, &answer):
			t.Errorf("%q to %q: %v is no *admin.Error", src, dst, err)
		case err == nil && (why.Outcome == "" || why.Next == "" || len(why.Steps) < 3):
			t.Errorf("%q to %q: incomplete: %+v", src, dst, why)
		}
	})
}
