package spiffe_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

var web = spiffe.ID{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		uri  string
		want spiffe.ID
		err  string // part of it; "" parses
	}{
		{uri: "spiffe://cluster.local/ns/shop/sa/web", want: web},
		{uri: "spiffe://td_1-x.y/ns/A.b/sa/C_d-9", want: spiffe.ID{TrustDomain: "td_1-x.y", Namespace: "A.b", ServiceAccount: "C_d-9"}},
		{uri: "", err: "does not start with spiffe://"},
		{uri: "https://cluster.local/ns/shop/sa/web", err: "does not start"},
		{uri: "SPIFFE://cluster.local/ns/shop/sa/web", err: "does not start"},
		{uri: "spiffe://cluster.local", err: "is not spiffe://<trust-domain>"},
		{uri: "spiffe://cluster.local/ns/shop/sa/web/", err: "is not spiffe://<trust-domain>"},
		{uri: "spiffe://cluster.local/sa/web/ns/shop", err: "is not spiffe://<trust-domain>"},
		{uri: "spiffe:///ns/shop/sa/web", err: "trust domain is empty"},
		{uri: "spiffe://cluster.local/ns//sa/web", err: "namespace is empty"},
		{uri: "spiffe://cluster.local/ns/shop/sa/", err: "service account is empty"},
		{uri: "spiffe://cluster.local/ns/../sa/web", err: "relative path segment"},
		{uri: "spiffe://Cluster.local/ns/shop/sa/web", err: "'C'"},
		{uri: "spiffe://cluster.local:80/ns/shop/sa/web", err: "':'"},
		{uri: "spiffe://me@cluster.local/ns/shop/sa/web", err: "'@'"},
		{uri: "spiffe://cluster.local/ns/sh%6fp/sa/web", err: "'%'"},
		{uri: "spiffe://cluster.local/ns/shop/sa/web?x", err: "'?'"},
		{uri: "spiffe://cluster.local/ns/shop/sa/web#x", err: "'#'"},
		{uri: "spiffe://cluster.local/ns/shop/sa/wéb", err: "has the character"},
		{uri: "spiffe://cluster.local/ns/shop/sa/" + strings.Repeat("x", 2048), err: "longer than 2048"},
	} {
		got, err := spiffe.Parse(tt.uri)
		switch {
		case tt.err == "" && err != nil:
			t.Errorf("Parse(%q): %v", tt.uri, err)
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("Parse(%q) error = %v, want one with %q", tt.uri, err, tt.err)
		case got != tt.want:
			t.Errorf("Parse(%q) = %+v, want %+v", tt.uri, got, tt.want)
		}
	}
}

func TestTextForms(t *testing.T) {
	if got := web.Principal(); got != "cluster.local/ns/shop/sa/web" {
		t.Errorf("Principal() = %q", got)
	}
	if got := web.URL().String(); got != web.String() {
		t.Errorf("URL() = %q, String() = %q", got, web.String())
	}
	var none spiffe.ID
	if !none.IsZero() || none.String() != "" || none.Principal() != "" {
		t.Errorf("zero ID is %q, %q", none.String(), none.Principal())
	}
	in := map[string]spiffe.ID{"a": web, "b": none}
	text, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"a":"spiffe://cluster.local/ns/shop/sa/web","b":""}`; string(text) != want {
		t.Errorf("JSON = %s, want %s", text, want)
	}
	var out map[string]spiffe.ID
	if err := json.Unmarshal(text, &out); err != nil || out["a"] != web || out["b"] != none {
		t.Errorf("from JSON: %v, %v", out, err)
	}
	if err := json.Unmarshal([]byte(`{"a":"nobody"}`), &out); err == nil {
		t.Error("JSON with an invalid ID was accepted")
	}
}

func TestFromCertificateWantsExactlyOneURI(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		uris   []string
		ok     bool
		urisan bool
	}{
		{name: "one", uris: []string{web.String()}, ok: true},
		{name: "none", urisan: true},
		{name: "two", uris: []string{web.String(), "spiffe://cluster.local/ns/shop/sa/db"}, urisan: true},
		{name: "the same twice", uris: []string{web.String(), web.String()}, urisan: true},
		{name: "not SPIFFE", uris: []string{"https://cluster.local/ns/shop/sa/web"}},
		{name: "percent-encoded", uris: []string{"spiffe://cluster.local/ns/sh%6Fp/sa/web"}},
		{name: "with a user", uris: []string{"spiffe://x@cluster.local/ns/shop/sa/web"}},
		{name: "with a query", uris: []string{"spiffe://cluster.local/ns/shop/sa/web?"}},
	} {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"web"}}
		for _, u := range tt.uris {
			parsed, err := url.Parse(u)
			if err != nil {
				t.Fatal(err)
			}
			template.URIs = append(template.URIs, parsed)
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		id, err := spiffe.FromCertificate(leaf)
		if (err == nil) != tt.ok || tt.ok && id != web {
			t.Errorf("%s: %v, %v", tt.name, id, err)
		}
		if errors.Is(err, spiffe.ErrURISANs) != tt.urisan {
			t.Errorf("%s: error %v, ErrURISANs %v", tt.name, err, tt.urisan)
		}
	}
}

// FuzzParse checks that what parses is exactly what it prints, so that no two texts are one
// identity, and that it survives as a URL.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{web.String(), "spiffe://td/ns/../sa/x", "spiffe://a@b/ns/c/sa/d", "spiffe://td/ns/a%2fb/sa/c"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		id, err := spiffe.Parse(uri)
		if err != nil {
			if !id.IsZero() {
				t.Fatalf("Parse(%q) = %v beside an error", uri, id)
			}
			return
		}
		if id.String() != uri {
			t.Fatalf("Parse(%q) prints as %q", uri, id)
		}
		if err := id.Validate(); err != nil {
			t.Fatalf("Parse(%q) is not valid: %v", uri, err)
		}
		u, err := url.Parse(uri)
		if err != nil || u.String() != uri {
			t.Fatalf("%q as a URL: %v, %v", uri, u, err)
		}
	})
}
