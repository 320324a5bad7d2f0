package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// bridge makes an address of the cluster's reachable from this process: a port of its own
// loopback interface leads there.
func (w *world) bridge(t *testing.T, to netip.AddrPort) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := w.Administrator().Dial(t.Context(), netns.DialConfig{Remote: to})
			if err != nil {
				near.Close()
				continue
			}
			copyOne := func(dst, src net.Conn) {
				_, _ = io.Copy(dst, src) // both ends see what goes wrong
				dst.Close()
			}
			conns.Go(func() { copyOne(far, near) })
			conns.Go(func() { copyOne(near, far) })
		}
	})
	t.Cleanup(func() { l.Close(); conns.Wait() })
	return l.Addr().String()
}

// token asks for a token of a service account that is bound to a pod, or to none.
func (w *world) token(t *testing.T, namespace, account, audience, pod string) string {
	t.Helper()
	seconds := int64(600)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}
	if audience != "" {
		request.Spec.Audiences = []string{audience}
	}
	if pod != "" {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod}
	}
	answer, err := w.client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return answer.Status.Token
}

// podOf is the first pod of a component on a node.
func (w *world) podOf(t *testing.T, component, node string) string {
	t.Helper()
	return w.kubectl(t, "-n", system, "get", "pods", "-l", "app.kubernetes.io/component="+component,
		"--field-selector=spec.nodeName="+node, "-o", "jsonpath={.items[0].metadata.name}")
}

// TestTheCAKnowsItsCallers asks for certificates as agents do, and as others would.
func TestTheCAKnowsItsCallers(t *testing.T) {
	w := onMesh(t)
	const ns = "identities"
	w.namespace(t, ns)
	w.run(t, ns, pod{name: "here", node: 1, args: []string{"serve"}}, pod{name: "there", node: 2, args: []string{"serve"}})
	agent := w.podOf(t, "agent", "node1")
	ca, err := netip.ParseAddr(w.podIP(t, system, w.podOf(t, "ca", "node2")))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	root := filepath.Join(dir, "root.pem")
	pemRoot := w.kubectl(t, "-n", system, "get", "configmap", "raceway-ca-root", `-o=jsonpath={.data.root-cert\.pem}`)
	if err := os.WriteFile(root, []byte(pemRoot), 0o600); err != nil {
		t.Fatal(err)
	}
	address := w.bridge(t, netip.AddrPortFrom(ca, 15012))

	const audience, account = "raceway-ca", "raceway-agent"
	here, there := "spiffe://cluster.local/ns/"+ns+"/sa/here", "spiffe://cluster.local/ns/"+ns+"/sa/there"
	for _, test := range []struct {
		name  string
		token string
		id    string
		want  codes.Code
	}{
		{"the agent of the pod's node", w.token(t, system, account, audience, agent), here, codes.OK},
		{"the agent of another node", w.token(t, system, account, audience, agent), there, codes.PermissionDenied},
		{"an identity that no pod has", w.token(t, system, account, audience, agent), "spiffe://cluster.local/ns/" + ns + "/sa/nobody", codes.PermissionDenied},
		{"another trust domain", w.token(t, system, account, audience, agent), "spiffe://elsewhere/ns/" + ns + "/sa/here", codes.PermissionDenied},
		{"a token for the API server", w.token(t, system, account, "", agent), here, codes.Unauthenticated},
		{"a token that is bound to no pod", w.token(t, system, account, audience, ""), here, codes.PermissionDenied},
		{"the pod itself", w.token(t, ns, "here", audience, "here"), here, codes.PermissionDenied},
		{"nobody's token", "nonsense", here, codes.Unauthenticated},
	} {
		t.Run(test.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(file, []byte(test.token), 0o600); err != nil {
				t.Fatal(err)
			}
			client, err := istio.NewClient(istio.ClientConfig{
				Address: address, ServerName: "raceway-ca." + system + ".svc", RootFile: root, TokenFile: file,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			id, err := spiffe.Parse(test.id)
			if err != nil {
				t.Fatal(err)
			}
			_, err = client.Sign(t.Context(), id, certificateRequest(t), time.Hour)
			var refused *istio.CallError
			switch {
			case test.want == codes.OK:
				if err != nil {
					t.Error(err)
				}
			case err == nil:
				t.Error("there was a certificate")
			case !errors.As(err, &refused) || refused.Code != test.want && refused.Code != codes.Unauthenticated:
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
}

func certificateRequest(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}
