package hbone_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
)

func TestUDPPath(t *testing.T) {
	for path, want := range map[string]hbone.Authority{
		"/.well-known/masque/udp/192.0.2.6/443/":            {Addr: netip.MustParseAddr("192.0.2.6"), Port: 443},
		"/.well-known/masque/udp/2001%3Adb8%3A%3A42/53/":    {Addr: netip.MustParseAddr("2001:db8::42"), Port: 53},
		"/.well-known/masque/udp/dns.demo.svc/65535/":       {Host: "dns.demo.svc", Port: 65535},
		"/.well-known/masque/udp/%3A%3A1/1/":                {Addr: netip.IPv6Loopback(), Port: 1},
		"/.well-known/masque/udp/my_db.example/5000/":       {Host: "my_db.example", Port: 5000},
		"/.well-known/masque/udp/fd00%3A%3Aabcd%3A1/15008/": {Addr: netip.MustParseAddr("fd00::abcd:1"), Port: 15008},
	} {
		if got := hbone.UDPPath(want); got != path {
			t.Errorf("UDPPath(%v) = %q, want %q", want, got, path)
		}
		if got, err := hbone.ParseUDPPath(path); err != nil || got != want {
			t.Errorf("ParseUDPPath(%q) = %+v, %v; want %+v", path, got, err, want)
		}
	}
	for path, want := range map[string]hbone.Authority{
		"/.well-known/masque/udp/2001:db8::42/53/":           {Addr: netip.MustParseAddr("2001:db8::42"), Port: 53},
		"/.well-known/masque/udp/2001%3adb8%3a%3a42/53/":     {Addr: netip.MustParseAddr("2001:db8::42"), Port: 53},
		"/.well-known/masque/udp/%31%30.0.0.1/53/":           {Addr: netip.MustParseAddr("10.0.0.1"), Port: 53},
		"/.well-known/masque/udp/%3A%3Affff%3A10.0.0.1/53/":  {Addr: netip.MustParseAddr("10.0.0.1"), Port: 53},
		"/.well-known/masque/udp/" + "%61" + ".example/123/": {Host: "a.example", Port: 123},
	} {
		if got, err := hbone.ParseUDPPath(path); err != nil || got != want {
			t.Errorf("ParseUDPPath(%q) = %+v, %v; want %+v", path, got, err, want)
		}
	}
	for _, path := range []string{
		"", "/", "/.well-known/masque/udp/", "/.well-known/masque/udp//443/", "/.well-known/masque/udp/10.0.0.1/443",
		"/.well-known/masque/udp/10.0.0.1/443//", "/.well-known/masque/udp/10.0.0.1/443/x", "/.well-known/masque/udp/10.0.0.1/0/",
		"/.well-known/masque/udp/10.0.0.1/65536/", "/.well-known/masque/udp/10.0.0.1/ 443/", "/.well-known/masque/udp/10.0.0.1%3A80/443/",
		"/.well-known/masque/udp/%5B%3A%3A1%5D/443/", "/.well-known/masque/udp/[::1]/443/", "/.well-known/masque/udp/fe80%3A%3A1%25eth0/443/",
		"/.well-known/masque/udp/a%2Fb/443/", "/.well-known/masque/udp/a%/443/", "/.well-known/masque/udp/a%4/443/", "/.well-known/masque/udp/a%zz/443/",
		"/.well-known/masque/udp/a b/443/", "/.well-known/masque/udp/a/443/?x=y", "/.well-known/masque/udp/*/443/", "/.well-known/masque/ip/10.0.0.1/443/",
		"https://proxy/.well-known/masque/udp/10.0.0.1/443/", "/.well-known/masque/udp/10.0.0.1/443%2F/", "/.well-known/masque/udp/010.0.0.1/443/",
		"/.well-known/masque/udp/" + strings.Repeat("%61", 254) + "/443/",
	} {
		if got, err := hbone.ParseUDPPath(path); err == nil {
			t.Errorf("ParseUDPPath(%q) = %+v, want an error", path, got)
		}
	}
}

func FuzzParseUDPPath(f *testing.F) {
	for _, s := range []string{
		"/.well-known/masque/udp/192.0.2.6/443/", "/.well-known/masque/udp/2001%3Adb8%3A%3A42/53/", "/.well-known/masque/udp/a%2e%62/1/",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		a, err := hbone.ParseUDPPath(path)
		if err != nil {
			return
		}
		if a.Addr.IsValid() == (a.Host != "") || a.Port == 0 || a.Addr.Is4In6() || a.Addr.Zone() != "" {
			t.Fatalf("%q parsed to %+v", path, a)
		}
		if again, err := hbone.ParseUDPPath(hbone.UDPPath(a)); err != nil || again != a {
			t.Fatalf("%q parsed to %+v, which became %+v, %v", path, a, again, err)
		}
	})
}
