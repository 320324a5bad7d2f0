package hbone_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
)

func TestParseAuthority(t *testing.T) {
	long := strings.Repeat("a.", 126) + "a" // 253 bytes
	for s, want := range map[string]hbone.Authority{
		"10.0.0.1:80":                        {Addr: netip.MustParseAddr("10.0.0.1"), Port: 80},
		"10.0.0.1:65535":                     {Addr: netip.MustParseAddr("10.0.0.1"), Port: 65535},
		"[2001:db8::1]:80":                   {Addr: netip.MustParseAddr("2001:db8::1"), Port: 80},
		"[::ffff:10.0.0.1]:80":               {Addr: netip.MustParseAddr("10.0.0.1"), Port: 80},
		"db.demo.svc.cluster.local:3306":     {Host: "db.demo.svc.cluster.local", Port: 3306},
		"my_db:1":                            {Host: "my_db", Port: 1},
		"a-b.example:1":                      {Host: "a-b.example", Port: 1},
		long + ":65535":                      {Host: long, Port: 65535},
		strings.Repeat("a", 63) + ".com:443": {Host: strings.Repeat("a", 63) + ".com", Port: 443},
	} {
		got, err := hbone.ParseAuthority(s)
		if err != nil || got != want {
			t.Errorf("ParseAuthority(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", ":", ":80", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:00080", "10.0.0.1:080", "10.0.0.1:65536", "10.0.0.1:-1",
		"10.0.0.1:+1", "10.0.0.1: 80", " 10.0.0.1:80", "10.0.0.1:80 ", "10.0.0.1:80/", "010.0.0.1:80", "10.0.0:80", "10.0.0.256:80",
		"1.2.3.4.5:80", "0x7f.1:80", "0x7f000001:80", "2130706433:80", "2001:db8::1:80", "[2001:db8::1]", "[2001:db8::1]80",
		"[2001:db8::1:80", "2001:db8::1]:80", "[10.0.0.1]:80", "[fe80::1%eth0]:80", "[]:80", "[[::1]]:80", "user@host:80", "host.:80",
		".host:80", "a..b:80", "-a:80", "a-:80", "a b:80", "a\x00b:80", "hö.example:80", "a%41:80", "http://a:80", "a:b:80",
		strings.Repeat("a", 64) + ":80", strings.Repeat("a.", 127) + "a:80",
	} {
		if got, err := hbone.ParseAuthority(s); err == nil {
			t.Errorf("ParseAuthority(%q) = %+v, want an error", s, got)
		}
	}
}

func TestParseBaggage(t *testing.T) {
	full := hbone.Baggage{
		Cluster: "Kubernetes", Namespace: "demo", WorkloadKind: "deployment", WorkloadName: "web",
		Service: "web", Version: "v1", Region: "r1", Zone: "z1",
	}
	const text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=demo,k8s.deployment.name=web,service.name=web,service.version=v1,cloud.region=r1,cloud.availability_zone=z1"
	if full.String() != text {
		t.Errorf("String = %q", full)
	}
	odd := hbone.Baggage{Service: `a,b;c="\%é`}
	for s, want := range map[string]hbone.Baggage{
		text:            full,
		"":              {},
		odd.String():    odd,
		"service.name=": {},
		" service.name = x ;p=1;q , k8s.pod.name=y": {Service: "x", WorkloadKind: "pod", WorkloadName: "y"},
		"k8s.job.name=j,k8s.pod.name=p":             {WorkloadKind: "job", WorkloadName: "j"},
		"other=%zz,service.name=x":                  {Service: "x"},
		"service.name=x,service.name=y":             {Service: "x"},
		"service.name=a%20b":                        {Service: "a b"},
		"k8s.node.name=n":                           {},
	} {
		got, err := hbone.ParseBaggage(s)
		if s == "" { // an empty list has no member
			if err == nil {
				t.Error("an empty header parsed")
			}
			continue
		}
		if err != nil || got != want {
			t.Errorf("ParseBaggage(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{
		"service.name", "=x", "a b=c", "service.name=a b", "service.name=a\"b", "service.name=%", "service.name=%4", "service.name=%zz",
		"service.name=%ff", "service.name=%00", "service.name=%0a", "service.name=\x7f", "service.name=" + strings.Repeat("x", 257),
		"service.name=x,,", strings.Repeat("a=b,", 200) + "a=b", strings.Repeat("x", 9000),
	} {
		if got, err := hbone.ParseBaggage(s); err == nil {
			t.Errorf("ParseBaggage(%.40q) = %+v, want an error", s, got)
		}
	}
}

func TestParseForwarded(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("10.0.0.1:4321"), netip.MustParseAddrPort("[2001:db8::1]:4321")
	for s, want := range map[string]hbone.Forwarded{
		`for="10.0.0.1:4321"`:                          {For: v4},
		`for="[2001:db8::1]:4321"`:                     {For: v6},
		`for="10.0.0.1:4321";host=db.demo`:             {For: v4, Host: "db.demo"},
		`for="10.0.0.1:4321";host="db.demo:3306"`:      {For: v4, Host: "db.demo:3306"},
		`FOR="10.0.0.1:4321" ; Host=db`:                {For: v4, Host: "db"},
		`for=10.0.0.1`:                                 {For: netip.AddrPortFrom(v4.Addr(), 0)},
		`for="[2001:db8::1]"`:                          {For: netip.AddrPortFrom(v6.Addr(), 0)},
		`for="2001:db8::1"`:                            {For: netip.AddrPortFrom(v6.Addr(), 0)},
		`for="\10.0.0.1:4321"`:                         {For: v4},
		`for=unknown;proto=http;by=_x`:                 {},
		`for=_hidden`:                                  {},
		`for="10.0.0.1:4321", for="192.0.2.1:1"`:       {For: v4},
		`for="[::ffff:10.0.0.1]:4321"`:                 {For: v4},
		`host=10.0.0.1`:                                {Host: "10.0.0.1"},
		`host="[2001:db8::1]:80"`:                      {Host: "[2001:db8::1]:80"},
		hbone.Forwarded{For: v6, Host: "a:1"}.String(): {For: v6, Host: "a:1"},
	} {
		got, err := hbone.ParseForwarded(s)
		if err != nil || got != want {
			t.Errorf("ParseForwarded(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", "for", "for=", "=x", `for="10.0.0.1:4321`, `for="x\`, "for=10.0.0.1:4321", `for="host:80"`, `for="10.0.0.1:99999"`,
		`for="[fe80::1%eth0]:1"`, `for="[10.0.0.1]"`, "for=10.0.0.1;for=10.0.0.2", "for=10.0.0.1;", "for=10.0.0.1,", "for=10.0.0.1 host=a",
		`host="a b"`, `host="a\"b"`, "host=" + strings.Repeat("a.", 130) + "a", "for=10.0.0.1;" + strings.Repeat("x", 3000),
	} {
		if got, err := hbone.ParseForwarded(s); err == nil {
			t.Errorf("ParseForwarded(%.40q) = %+v, want an error", s, got)
		}
	}
}

func TestCheckTraceParent(t *testing.T) {
	const good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	for _, s := range []string{good, "01" + good[2:], "cc" + good[2:] + "-more", hbone.NewTraceParent()} {
		if err := hbone.CheckTraceParent(s); err != nil {
			t.Errorf("CheckTraceParent(%q) = %v", s, err)
		}
	}
	for _, s := range []string{
		"", good[:54], good + "-", good + "x", "ff" + good[2:], strings.ToUpper(good), "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
		"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", strings.Replace(good, "-", "_", 1), "01" + good[2:] + "x",
		"01" + good[2:] + "-\n", "01" + good[2:] + "-" + strings.Repeat("x", 512),
	} {
		if hbone.CheckTraceParent(s) == nil {
			t.Errorf("CheckTraceParent(%q) = nil", s)
		}
	}
	if a, b := hbone.NewTraceParent(), hbone.NewTraceParent(); a == b {
		t.Error("two traces have one id")
	}
}

func TestBadHeadersAreIgnoredAndTheFirstGoodOneCounts(t *testing.T) {
	var r hbone.Request
	for _, f := range [][2]string{
		{"baggage", "broken"},
		{"baggage", "service.name=a"},
		{"baggage", "service.name=b"},
		{"forwarded", "broken"},
		{"forwarded", `for="10.0.0.1:1"`},
		{"forwarded", `for="10.0.0.2:2"`},
		{"traceparent", "broken"},
		{"x-unknown", "y"},
	} {
		r.SetField(f[0], f[1])
	}
	want := hbone.Request{Baggage: hbone.Baggage{Service: "a"}, Forwarded: hbone.Forwarded{For: netip.MustParseAddrPort("10.0.0.1:1")}}
	if r != want {
		t.Errorf("request = %+v, want %+v", r, want)
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range []string{"10.0.0.1:80", "[2001:db8::1]:80", "db.demo.svc:3306", "[::ffff:10.0.0.1]:80", "0x7f.1:80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := hbone.ParseAuthority(s)
		if err != nil {
			return
		}
		if a.Addr.IsValid() == (a.Host != "") || a.Port == 0 || len(s) > hbone.MaxAuthority {
			t.Fatalf("%q parsed to %+v", s, a)
		}
		if a.Addr.Is4In6() || a.Addr.Zone() != "" {
			t.Fatalf("%q parsed to the address %v", s, a.Addr)
		}
		again, err := hbone.ParseAuthority(a.String())
		if err != nil || again != a {
			t.Fatalf("%q parsed to %+v, whose text %q to %+v, %v", s, a, a, again, err)
		}
	})
}

func FuzzParseBaggage(f *testing.F) {
	for _, s := range []string{"k8s.cluster.name=a,k8s.deployment.name=b;x=y", "service.name=%41%c3%a9", "cloud.region=,a=b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := hbone.ParseBaggage(s)
		if err != nil || b == (hbone.Baggage{}) {
			return
		}
		if (b.WorkloadKind == "") != (b.WorkloadName == "") {
			t.Fatalf("%q parsed to %+v", s, b)
		}
		if again, err := hbone.ParseBaggage(b.String()); err == nil && again != b || err != nil && len(b.String()) < 8<<10 {
			t.Fatalf("%q parsed to %+v, whose text %q to %+v, %v", s, b, b, again, err)
		}
	})
}

func FuzzParseForwarded(f *testing.F) {
	for _, s := range []string{`for="10.0.0.1:80";host=a`, `for="[2001:db8::1]:80", for=_x`, `host="a:1";by=unknown`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		fw, err := hbone.ParseForwarded(s)
		if err != nil || fw == (hbone.Forwarded{}) {
			return
		}
		if again, err := hbone.ParseForwarded(fw.String()); err != nil || again != fw {
			t.Fatalf("%q parsed to %+v, whose text %q to %+v, %v", s, fw, fw, again, err)
		}
	})
}

func FuzzCheckTraceParent(f *testing.F) {
	f.Add("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	f.Add("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x")
	f.Fuzz(func(t *testing.T, s string) {
		if hbone.CheckTraceParent(s) == nil && strings.ContainsAny(s, "\r\n\x00 ,") {
			t.Fatalf("%q passes", s)
		}
	})
}
