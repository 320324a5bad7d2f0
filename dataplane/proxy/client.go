package proxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
)

func (s *servedPod) dialTunnel(ctx context.Context, key hbone.Key) (net.Conn, error) {
	conn, err := s.pod.DialTunnel(ctx, key.Remote)
	if err != nil {
		return nil, err
	}
	_ = conn.SetKeepAliveConfig(keepAlive()) // HTTP/2 asks for signs of life as well
	return conn, nil
}

// clientTLS shows our certificate and accepts the key's peer alone.
func (s *servedPod) clientTLS(_ context.Context, key hbone.Key) (*tls.Config, error) {
	peer, err := spiffe.Parse(key.Peer)
	if err != nil {
		return nil, fmt.Errorf("identity of the peer: %w", err)
	}
	config, err := s.cfg.Certs.ClientTLS(s.identity, []spiffe.ID{peer})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", hbone.ErrNoCertificate, err)
	}
	show := config.GetClientCertificate
	if show == nil {
		return config, nil
	}
	config = config.Clone()
	config.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		c, err := show(r)
		if err == nil && c.Leaf != nil {
			s.retire.shown(time.Now(), c.Leaf.NotBefore, c.Leaf.NotAfter)
		}
		return c, err
	}
	return config, nil
}

// retirement says when tunnel connections are too old for new streams: they were made with
// a certificate that should have been refreshed by now, and must not outlive it by a pool
// that is never idle.
type retirement struct {
	mu sync.Mutex
	at time.Time // zero: no connection yet
}

// shown notes a handshake with a certificate of that validity. Certificates are refreshed at
// half their life, so three quarters leave the CA time to be away.
func (r *retirement) shown(now, notBefore, notAfter time.Time) {
	at := notAfter.Add(-notAfter.Sub(notBefore) / 4)
	if !at.After(now) { // the CA is away: half of what is left, so that not every stream makes a connection
		at = now.Add(max(notAfter.Sub(now)/2, time.Second))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at.IsZero() || at.Before(r.at) {
		r.at = at
	}
}

func (r *retirement) due(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at.IsZero() || now.Before(r.at) {
		return false
	}
	r.at = time.Time{}
	return true
}

// retireOld takes the pooled connections out of use when their certificate is old.
func (s *servedPod) retireOld() {
	if s.retire.due(time.Now()) {
		s.retireTunnels()
	}
}

// retireTunnels takes all pooled connections out of use, whatever they are on.
func (s *servedPod) retireTunnels() {
	all := func(hbone.Key) bool { return true }
	s.client.RetireKeys(all)
	if u := s.datagrams(); u != nil && u.quic != nil {
		u.quic.client.RetireKeys(all)
	}
}

// credentialError is that we have no certificate to show.
type credentialError struct{ err error }

func (e *credentialError) Error() string { return e.err.Error() }
func (e *credentialError) Unwrap() error { return e.err }

// countTLSError counts a handshake that failed once, though all that waited for it are told
// with the same error.
func (s *servedPod) countTLSError(err error) {
	var failed *hbone.TLSError
	if errors.As(err, &failed) && s.tlsError.Swap(failed) != failed {
		s.cfg.Telemetry.HandshakeFailed(telemetry.Outbound, string(certs.CauseOf(failed.Err)))
	}
}

// baggage describes w to peers.
func (s *servedPod) baggage(w *dataplane.Workload) hbone.Baggage {
	b := hbone.Baggage{
		Cluster: cmp.Or(w.Cluster, s.cfg.Cluster), Namespace: w.Name.Namespace,
		WorkloadKind: "pod", WorkloadName: w.Name.Name,
		Service: telemetry.CanonicalService(w), Version: telemetry.CanonicalRevision(w),
	}
	switch kind := strings.ToLower(w.Owner.Kind); kind {
	case "deployment", "cronjob", "job":
		b.WorkloadKind, b.WorkloadName = kind, w.Owner.Name
	}
	if snapshot, _ := s.cfg.Store.Load(); snapshot != nil {
		if node := snapshot.Node(w.Node); node != nil {
			b.Region, b.Zone = node.Region, node.Zone
		}
	}
	return b
}

// flagsOf classifies why a connection did not come up.
func flagsOf(err error) telemetry.Flags {
	var (
		denied     *deniedError
		limit      *limitError
		unroutable *routeError
		credential *credentialError
		handshake  *hbone.TLSError
		dial       *hbone.DialError
		status     *hbone.StatusError
		op         *net.OpError
	)
	switch {
	case errors.As(err, &denied):
		return telemetry.FlagsDeny
	case errors.As(err, &limit), errors.Is(err, hbone.ErrNoBuffers):
		return telemetry.FlagsLimit
	case errors.Is(err, errForced):
		return telemetry.FlagsDrained
	case errors.As(err, &status) && status.Status == 401:
		return telemetry.FlagsDeny
	case errors.As(err, &handshake), errors.As(err, &credential):
		return telemetry.FlagsTLS
	case errors.As(err, &status) && status.Status == 503, errors.As(err, &dial), errors.As(err, &op),
		errors.Is(err, context.DeadlineExceeded), errors.As(err, new(syscall.Errno)):
		return telemetry.FlagsConnect
	case errors.As(err, &status):
		return telemetry.FlagsPeer
	case errors.As(err, &unroutable):
		return telemetry.FlagsRoute
	default:
		return telemetry.FlagsUnknown
	}
}

// endFlags classifies why an open connection was broken off.
func endFlags(err error) telemetry.Flags {
	switch flags := flagsOf(err); flags {
	case telemetry.FlagsDeny, telemetry.FlagsDrained:
		return flags
	default:
		return telemetry.FlagsReset
	}
}
