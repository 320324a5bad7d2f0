package certs_test

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

func only(t *testing.T, k *certs.Keeper) certs.Status {
	t.Helper()
	list := k.Status()
	if len(list) != 1 {
		t.Fatalf("%d identities, want 1: %v", len(list), list)
	}
	return list[0]
}

func TestRefreshesAtHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := certstest.New(t, td)
		k := a.Keeper(t, web)
		first := only(t, k)
		if first.State != certs.StateValid || first.LastError != nil || !first.NotAfter.After(time.Now().Add(23*time.Hour)) {
			t.Fatalf("at first: %+v", first)
		}
		if in := time.Until(first.RefreshAt); in < 10*time.Hour || in > 14*time.Hour {
			t.Errorf("refresh in %s of a 24 h certificate", in)
		}
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if now := only(t, k); now.Serial != first.Serial || a.Requests() != 1 {
			t.Errorf("refreshed before its time: %+v", now)
		}
		time.Sleep(4 * time.Hour)
		synctest.Wait()
		second := only(t, k)
		if second.Serial == first.Serial || a.Requests() != 2 || !second.NotAfter.After(first.NotAfter) {
			t.Errorf("not refreshed after 14 h, %d requests: %+v", a.Requests(), second)
		}
		time.Sleep(20 * 24 * time.Hour)
		synctest.Wait()
		if now := only(t, k); now.State != certs.StateValid || a.Requests() < 30 || a.Requests() > 60 {
			t.Errorf("after three weeks and %d requests: %+v", a.Requests(), now)
		}
	})
}

func TestRefreshTimesOfManyIdentitiesSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := certstest.New(t, td).Keeper(t)
		for _, sa := range strings.Split("abcdefghijklmnop", "") {
			id := spiffe.ID{TrustDomain: td, Namespace: "n", ServiceAccount: sa}
			k.Want(id)
			if err := k.Ready(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		var first, last time.Time
		for _, s := range k.Status() {
			if first.IsZero() || s.RefreshAt.Before(first) {
				first = s.RefreshAt
			}
			if s.RefreshAt.After(last) {
				last = s.RefreshAt
			}
		}
		if last.Sub(first) < 10*time.Minute {
			t.Errorf("16 refreshes of 24 h certificates lie within %s", last.Sub(first))
		}
	})
}

func TestCAAwayLeavesAValidCertificateInUseUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := certstest.New(t, td)
		k := a.Keeper(t, web)
		first := only(t, k)
		away := errors.New("CA 10.0.0.1:15012: connection refused")
		a.FailWith(away)
		time.Sleep(20 * time.Hour)
		synctest.Wait()
		s := only(t, k)
		if s.State != certs.StateValid || s.Serial != first.Serial || !errors.Is(s.LastError, away) || s.Failures < 10 {
			t.Errorf("while the CA is away: %+v", s)
		}
		if pause := time.Until(s.RefreshAt); pause > 30*time.Second {
			t.Errorf("next attempt in %s", pause)
		}
		if _, err := k.ClientTLS(web, []spiffe.ID{db}); err != nil {
			t.Errorf("valid certificate not used: %v", err)
		}
		time.Sleep(5 * time.Hour)
		synctest.Wait()
		if s = only(t, k); s.State != certs.StateExpired || !s.Since.Equal(first.NotAfter) {
			t.Errorf("after expiry: %+v", s)
		}
		_, err := k.ClientTLS(web, []spiffe.ID{db})
		var missing *certs.NoCertificateError
		if !errors.As(err, &missing) || missing.Identity != web || !missing.Since.Equal(first.NotAfter) || !errors.Is(err, away) {
			t.Errorf("error after expiry: %v", err)
		}
		a.FailWith(nil)
		if err := k.Ready(t.Context(), web); err != nil {
			t.Fatal(err)
		}
		if s = only(t, k); s.State != certs.StateValid || s.LastError != nil || s.Failures != 0 {
			t.Errorf("after the CA came back: %+v", s)
		}
	})
}

func TestCAAwayAtStartIsTheReasonGiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := certstest.New(t, td)
		away := errors.New("CA 10.0.0.1:15012: connection refused")
		a.FailWith(away)
		k := a.Keeper(t)
		start := time.Now()
		k.Want(web)
		k.Want(web) // changes nothing
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := k.Ready(ctx, web)
		var missing *certs.NoCertificateError
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, away) || !errors.As(err, &missing) || !missing.Since.Equal(start) {
			t.Errorf("Ready: %v", err)
		}
		if !strings.Contains(err.Error(), web.String()) || !strings.Contains(err.Error(), "since 2000-01-01T00:00:00Z") {
			t.Errorf("error does not say which identity and since when: %v", err)
		}
		if s := only(t, k); s.State != certs.StateFailed || !errors.Is(s.LastError, away) || !s.Since.Equal(start) {
			t.Errorf("status: %+v", s)
		}
		// 0.25 s doubled with jitter makes some 8 to 16 attempts in a minute.
		if n := a.Requests(); n < 6 || n > 20 {
			t.Errorf("%d requests in a minute", n)
		}
		before := a.Requests()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := a.Requests() - before; n < 110 || n > 250 {
			t.Errorf("%d requests in an hour, want one every 15 to 30 s", n)
		}
	})
}

// silent is a Signer that answers only when its context ends.
type silent struct {
	mu        sync.Mutex
	now, most int
}

func (s *silent) Sign(ctx context.Context, _ spiffe.ID, _ []byte, _ time.Duration) ([][]byte, error) {
	s.count(1)
	defer s.count(-1)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s *silent) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now += n
	s.most = max(s.most, s.now)
}

func TestSilentCAIsGivenUpAndAskedByFewAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := &silent{}
		k := certstest.Run(t, certs.Config{
			Signer: signer, Roots: certstest.Bundle(t, certstest.New(t, td)), TrustDomain: td, Concurrency: 3, SignTimeout: 5 * time.Second,
		})
		for _, sa := range strings.Split("abcdefghij", "") {
			k.Want(spiffe.ID{TrustDomain: td, Namespace: "n", ServiceAccount: sa})
		}
		synctest.Wait()
		if s := k.Status()[0]; s.State != certs.StatePending {
			t.Errorf("before the first answer: %+v", s)
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		for _, s := range k.Status() {
			if s.State != certs.StateFailed || !errors.Is(s.LastError, context.DeadlineExceeded) {
				t.Errorf("after the deadline: %+v", s)
			}
		}
		if signer.most != 3 {
			t.Errorf("%d requests at once, want 3", signer.most)
		}
	})
}

func TestForgetEndsRequestsAndWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := &silent{}
		k := certstest.Run(t, certs.Config{Signer: signer, Roots: certstest.Bundle(t, certstest.New(t, td)), TrustDomain: td})
		k.Want(web)
		waited := make(chan error, 1)
		go func() { waited <- k.Ready(t.Context(), web) }()
		synctest.Wait()
		k.Forget(web)
		k.Forget(web) // changes nothing
		synctest.Wait()
		var missing *certs.NoCertificateError
		if err := <-waited; !errors.As(err, &missing) || !strings.Contains(err.Error(), "no pod of this node") {
			t.Errorf("Ready: %v", err)
		}
		if signer.now != 0 || len(k.Status()) != 0 {
			t.Errorf("%d requests and %d identities after Forget", signer.now, len(k.Status()))
		}
	})
}

func TestRepliesThatPeersWouldRefuseAreNotUsed(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*x509.Certificate)
		text string
	}{
		{"another identity", func(c *x509.Certificate) { c.URIs[0].Path = "/ns/shop/sa/db" }, "the certificate is for " + db.String()},
		{"two SANs", func(c *x509.Certificate) { c.URIs = append(c.URIs, db.URL()) }, "exactly one URI SAN"},
		{"expired", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, "expired at"},
		{"not yet valid", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, "compare the clocks"},
		{"client only", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, "extended key usage"},
		{"a CA", func(c *x509.Certificate) { c.IsCA = true }, "signing certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := certstest.New(t, td)
				a.Edit(tt.edit)
				k := a.Keeper(t)
				k.Want(web)
				synctest.Wait()
				if s := only(t, k); s.State != certs.StateFailed || !strings.Contains(s.LastError.Error(), tt.text) {
					t.Errorf("%+v, want an error with %q", s, tt.text)
				}
			})
		})
	}
	t.Run("another authority", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			k := certstest.Run(t, certs.Config{Signer: certstest.New(t, td), Roots: certstest.Bundle(t, certstest.New(t, td)), TrustDomain: td})
			k.Want(web)
			synctest.Wait()
			if s := only(t, k); s.State != certs.StateFailed || certs.CauseOf(s.LastError) != certs.CauseUntrusted {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("another key", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a := certstest.New(t, td)
			k := certstest.Run(t, certs.Config{Signer: fixed(a.Issue(t, certstest.Leaf(web.String())).Certificate[0]), Roots: certstest.Bundle(t, a), TrustDomain: td})
			k.Want(web)
			synctest.Wait()
			if s := only(t, k); s.State != certs.StateFailed || !strings.Contains(s.LastError.Error(), "another key") {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("no PEM", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			k := certstest.Run(t, certs.Config{Signer: fixed(nil), Roots: certstest.Bundle(t, certstest.New(t, td)), TrustDomain: td})
			k.Want(web)
			synctest.Wait()
			if s := only(t, k); s.State != certs.StateFailed {
				t.Errorf("%+v", s)
			}
		})
	})
}

// fixed is a Signer that always returns the same certificate.
type fixed []byte

func (f fixed) Sign(context.Context, spiffe.ID, []byte, time.Duration) ([][]byte, error) {
	return [][]byte{certstest.PEM(f)}, nil
}

func TestInvalidIdentityIsNeverAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := certstest.New(t, td)
		k := a.Keeper(t)
		k.Want(spiffe.ID{TrustDomain: td, Namespace: "shop"})
		synctest.Wait()
		if s := only(t, k); s.State != certs.StateFailed || !strings.Contains(s.LastError.Error(), "service account is empty") || a.Requests() != 0 {
			t.Errorf("%d requests, %+v", a.Requests(), s)
		}
	})
}

func TestConfigNamesEveryComplaint(t *testing.T) {
	_, err := certs.New(certs.Config{TTL: -1})
	for _, want := range []string{"no signer", "no trust domain", "no trust roots", "negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
	a := certstest.New(t, td)
	if _, err := certs.New(certs.Config{Signer: a, TrustDomain: "other", Roots: certstest.Bundle(t, a)}); err == nil || !strings.Contains(err.Error(), `"other"`) {
		t.Errorf("roots of another trust domain: %v", err)
	}
}

func TestRunsOnlyOnce(t *testing.T) {
	k := certstest.New(t, td).Keeper(t, web)
	if err := k.Run(t.Context()); err == nil {
		t.Error("ran twice")
	}
}
