package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/cluster/clustertest"
	"github.com/raceway-mesh/raceway/e2e/cluster/parts"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

const (
	portDNS   = 53
	portHTTPS = 443
	portIperf = 5201
	portAPI   = 6443
)

// requirePeer skips the test where a program is missing, or fails it where peers must be there.
func requirePeer(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		if os.Getenv("RACEWAY_REQUIRE_PEERS") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// Names that dig asks CoreDNS for cannot be read on the link, whether the answer is short, longer
// than DNS had foreseen, or so long that dig asks again by TCP.
func TestUDPNamesAreConcealed(t *testing.T) {
	requirePeer(t, "dig")
	clustertest.Require(t)
	services := map[string]int{"cart-of-names": 1, "long-of-names": 40, "tcp-of-names": 200}
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		serveNames(t, p.db, services)
		eventually(t, "CoreDNS serves", func() error {
			_, err := p.dig(t.Context(), "cart-of-names")
			return err
		})
		p.conceals(p.readable([]byte("of-names")), func() {
			for name, want := range map[string]struct {
				least, most int
				way         string
			}{
				"cart-of-names": {12, 512, "UDP"},
				"long-of-names": {513, 1232, "UDP"},
				"tcp-of-names":  {1233, 65_535, "TCP"},
			} {
				got, err := p.dig(t.Context(), name)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					continue
				}
				if got.addresses != services[name] || got.way != want.way || got.size < want.least || got.size > want.most {
					t.Errorf("%s: %+v, want %d addresses in %d to %d bytes by %s", name, got, services[name], want.least, want.most, want.way)
				}
			}
		})
		if !slices.ContainsFunc(udpFlows(t, p.cluster, p.Node(2)), func(f admin.Connection) bool { return f.Destination.Addr.Port() == portDNS }) {
			t.Error("the agent of the DNS server lists no question")
		}
	})
}

// dug is what dig says of an answer.
type dug struct {
	addresses, size int
	way             string // UDP or TCP
}

var (
	dugAnswer = regexp.MustCompile(`status: NOERROR(?s:.*), ANSWER: (\d+),`)
	dugSize   = regexp.MustCompile(`;; MSG SIZE +rcvd: (\d+)`)
	dugWay    = regexp.MustCompile(`;; SERVER: .* \((UDP|TCP)\)`)
)

// dig asks db for the addresses of a service.
func (p *udpPair) dig(ctx context.Context, service string) (dug, error) {
	out, err := p.web.Exec(ctx, "dig", "@"+p.db.Addr().String(), "-p", strconv.Itoa(portDNS), "A", service+".shop.svc.cluster.local.")
	if err != nil {
		return dug{}, fmt.Errorf("%w: %s", err, out)
	}
	answer, size, way := dugAnswer.FindSubmatch(out), dugSize.FindSubmatch(out), dugWay.FindSubmatch(out)
	if answer == nil || size == nil || way == nil {
		return dug{}, fmt.Errorf("dig says %s", out)
	}
	var d dug
	d.addresses, _ = strconv.Atoi(string(answer[1])) // digits
	d.size, _ = strconv.Atoi(string(size[1]))
	d.way = string(way[1])
	return d, nil
}

// serveNames has CoreDNS serve headless services of namespace "shop", each with so many addresses.
func serveNames(t *testing.T, pod *lab.Pod, services map[string]int) {
	t.Helper()
	found, err := parts.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	serveAPI(t, pod, services)
	corefile := filepath.Join(t.TempDir(), "Corefile")
	config := fmt.Sprintf(".:%d {\n errors\n kubernetes cluster.local {\n  endpoint http://127.0.0.1:%d\n }\n}\n", portDNS, portAPI)
	if err := os.WriteFile(corefile, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pod.Start(exec.Command(found.CoreDNS(), "-conf", corefile)); err != nil {
		t.Fatal(err)
	}
}

// serveAPI is as much of an API server as CoreDNS asks: lists, and watches that tell nothing.
func serveAPI(t *testing.T, pod *lab.Pod, services map[string]int) {
	t.Helper()
	version := metav1.ListMeta{ResourceVersion: "1"}
	lists := map[string]any{
		"/api/v1/namespaces": &corev1.NamespaceList{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NamespaceList"}, ListMeta: version,
			Items: []corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}},
		},
	}
	serviceList := &corev1.ServiceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceList"}, ListMeta: version}
	sliceList := &discoveryv1.EndpointSliceList{TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"}, ListMeta: version}
	for _, name := range slices.Sorted(maps.Keys(services)) {
		meta := metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}}
		serviceList.Items = append(serviceList.Items, corev1.Service{
			ObjectMeta: meta, Spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, ClusterIPs: []string{corev1.ClusterIPNone}},
		})
		slice := discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4}
		for i := range services[name] {
			addr := netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{addr.String()}})
		}
		sliceList.Items = append(sliceList.Items, slice)
	}
	lists["/api/v1/services"], lists["/apis/discovery.k8s.io/v1/endpointslices"] = serviceList, sliceList

	listener, err := pod.Listen(portAPI)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		list, query := lists[r.URL.Path], r.URL.Query()
		switch {
		case list == nil:
			http.NotFound(w, r)
		case query.Has("sendInitialEvents"): // and then it asks for a list
			http.Error(w, "no streaming lists", http.StatusUnprocessableEntity)
		case query.Has("watch"):
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		default:
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(list) // a client that has gone asks no more
		}
	})}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		_ = server.Close()
		serving.Wait()
	})
}

// iperf3 measures what it sends and what it is sent; nothing of either is in clear.
func TestUDPIsMeasuredByIperf(t *testing.T) {
	requirePeer(t, "iperf3")
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		if _, err := p.db.Start(exec.Command("iperf3", "--server", "--port", strconv.Itoa(portIperf))); err != nil {
			t.Fatal(err)
		}
		p.conceals(p.port(portIperf), func() {
			for name, args := range map[string][]string{"sent": nil, "received": {"--reverse"}} {
				var sum iperfSum
				eventually(t, "iperf3's server takes the next client", func() (err error) {
					sum, err = p.iperf(t.Context(), args...)
					return err
				})
				t.Logf("%s: %s", name, sum)
				if sum.Bytes < 1<<20 || sum.Packets == 0 || sum.Jitter == nil || sum.LostPercent == nil {
					t.Errorf("%s: %s", name, sum)
				} else if *sum.LostPercent > 50 {
					t.Errorf("%s: %.1f%% were lost", name, *sum.LostPercent)
				}
			}
		})
	})
}

// iperfSum is iperf3's account of a run.
type iperfSum struct {
	Bytes       uint64   `json:"bytes"`
	Packets     uint64   `json:"packets"`
	Jitter      *float64 `json:"jitter_ms"`
	LostPercent *float64 `json:"lost_percent"`
}

func (s iperfSum) String() string {
	text, _ := json.Marshal(s) // has numbers alone
	return string(text)
}

// iperf has 20 Mbit/s sent for a second.
func (p *udpPair) iperf(ctx context.Context, args ...string) (iperfSum, error) {
	args = append([]string{
		"--client", p.db.Addr().String(), "--port", strconv.Itoa(portIperf), "--json",
		"--udp", "--bitrate", "20M", "--time", "1",
	}, args...)
	out, err := p.web.Exec(ctx, "iperf3", args...)
	if err != nil {
		return iperfSum{}, fmt.Errorf("%w: %s", err, out)
	}
	var report struct {
		End struct {
			Sum iperfSum `json:"sum"`
		} `json:"end"`
		Error string `json:"error"` // which its exit code does not tell of
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return iperfSum{}, fmt.Errorf("read iperf3's report: %w: %s", err, out)
	}
	if report.Error != "" {
		return iperfSum{}, errors.New(report.Error)
	}
	return report.End.Sum, nil
}

// HTTP/3 works inside of tunnels that are HTTP/3 themselves: large bodies both ways, several at
// once, and both ends find out how long a packet the tunnel takes.
func TestUDPCarriesHTTP3(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		ca := certstest.New(t, "shop.test")
		leaf := certstest.Leaf()
		leaf.DNSNames = []string{"db.shop.test"}
		var client, server packetSizes
		content := random(4 << 20)
		serveHTTP3(t, p.db, &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, leaf)}}, &server, content)
		roots := x509.NewCertPool()
		roots.AddCert(ca.Root)
		p.conceals(p.port(portHTTPS), func() {
			client.forget()
			server.forget()
			web := newHTTP3Client(t, p.web, p.db.AddrPort(portHTTPS), &tls.Config{RootCAs: roots}, &client)
			var requests sync.WaitGroup
			for i := range 8 {
				requests.Go(func() {
					if err := fetch(t.Context(), web, i%2 == 0, content); err != nil {
						t.Errorf("request %d: %v", i, err)
					}
				})
			}
			requests.Wait()
		})
		for name, sizes := range map[string]*packetSizes{"client": &client, "server": &server} {
			if got := sizes.longest(); got <= leastPacket || got >= 1452 {
				t.Errorf("the %s found out that packets of %d bytes fit, want more than %d and less than without the tunnel", name, got, leastPacket)
			}
		}
	})
}

// leastPacket is what QUIC begins with.
const leastPacket = 1280

// serveHTTP3 answers GET with content and POST with its body.
func serveHTTP3(t *testing.T, pod *lab.Pod, config *tls.Config, sizes *packetSizes, content []byte) {
	t.Helper()
	conn, err := pod.ListenPacket(t.Context(), "udp", fmt.Sprintf(":%d", portHTTPS))
	if err != nil {
		t.Fatal(err)
	}
	server := &http3.Server{
		TLSConfig: http3.ConfigureTLSConfig(config), QUICConfig: &quic.Config{Tracer: sizes.trace},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body := io.Reader(bytes.NewReader(content))
			if r.Method == http.MethodPost {
				body = r.Body
			}
			if _, err := io.Copy(w, body); err != nil {
				t.Error("the server:", err)
			}
		}),
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(conn); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		_ = server.Close()
		_ = conn.Close()
		serving.Wait()
	})
}

// newHTTP3Client has one socket, and one connection to the server.
func newHTTP3Client(t *testing.T, pod *lab.Pod, server netip.AddrPort, config *tls.Config, sizes *packetSizes) *http.Client {
	t.Helper()
	conn, err := pod.ListenPacket(t.Context(), "udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	socket := &quic.Transport{Conn: conn}
	transport := &http3.Transport{
		TLSClientConfig: config, QUICConfig: &quic.Config{Tracer: sizes.trace},
		Dial: func(ctx context.Context, _ string, tls *tls.Config, cfg *quic.Config) (*quic.Conn, error) {
			return socket.DialEarly(ctx, net.UDPAddrFromAddrPort(server), tls, cfg)
		},
	}
	t.Cleanup(func() {
		_ = transport.Close()
		_ = socket.Close()
		_ = conn.Close()
	})
	return &http.Client{Transport: transport, Timeout: patience}
}

// fetch gets content, or has it sent back.
func fetch(ctx context.Context, client *http.Client, get bool, content []byte) error {
	method, body := http.MethodPost, io.Reader(bytes.NewReader(content))
	if get {
		method, body = http.MethodGet, nil
	}
	request, err := http.NewRequestWithContext(ctx, method, "https://db.shop.test/", body)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	sum := sha256.New()
	if n, err := io.Copy(sum, response.Body); err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if want := sha256.Sum256(content); !bytes.Equal(sum.Sum(nil), want[:]) {
		return errors.New("the body differs")
	}
	return nil
}

// packetSizes notes what a QUIC endpoint finds out about its path.
type packetSizes struct {
	mu   sync.Mutex
	most int
}

func (s *packetSizes) trace(context.Context, bool, quic.ConnectionID) qlogwriter.Trace { return s }

// AddProducer implements qlogwriter.Trace.
func (s *packetSizes) AddProducer() qlogwriter.Recorder { return s }

// SupportsSchemas implements qlogwriter.Trace.
func (s *packetSizes) SupportsSchemas(string) bool { return false }

// RecordEvent implements qlogwriter.Recorder.
func (s *packetSizes) RecordEvent(e qlogwriter.Event) {
	if mtu, ok := e.(qlog.MTUUpdated); ok {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.most = max(s.most, mtu.Value)
	}
}

// Close implements qlogwriter.Recorder.
func (s *packetSizes) Close() error { return nil }

func (s *packetSizes) longest() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.most
}

// forget begins anew, for another path.
func (s *packetSizes) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.most = 0
}
