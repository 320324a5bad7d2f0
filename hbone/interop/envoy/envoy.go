// Package envoy configures an Envoy that is one end of HBONE tunnels: the client's as a sidecar
// is, or the server's as a sidecar or a waypoint is. Tests of interoperability and benchmarks
// run it.
package envoy

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"text/template"
)

// Relay is an Envoy that takes connections at Listen and hands them on to Dial. One of its two
// ends is a tunnel.
type Relay struct {
	Listen, Dial netip.AddrPort
	// Target is the authority that a client's end asks for, and the only one that a server's
	// end serves.
	Target          string
	Cert, Key, Root string // files: what it shows, and whom it trusts
	// Peer is the SPIFFE ID, or the DNS name, that a client's end wants of the server. "" makes
	// it the server's end, which takes any client whose certificate it trusts.
	Peer    string
	Baggage string // header that a client's end sends; "" for none
}

// SAN is the type of Peer in a certificate.
func (r Relay) SAN() string {
	if strings.Contains(r.Peer, "://") {
		return "URI"
	}
	return "DNS"
}

// Config is the relay's configuration, as YAML.
func (r Relay) Config() ([]byte, error) {
	var text bytes.Buffer
	if err := config.Execute(&text, r); err != nil {
		return nil, fmt.Errorf("write Envoy's configuration: %w", err)
	}
	return text.Bytes(), nil
}

// Both ends' circuit breakers are opened: the default ones stop at 1,024 connections.
var config = template.Must(template.New("envoy").Parse(`
static_resources:
  listeners:
  - name: relay
    address: {socket_address: {address: "{{.Listen.Addr}}", port_value: {{.Listen.Port}}}}
    filter_chains:
{{- if .Peer}}
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: relay
          cluster: next
          idle_timeout: 0s
          tunneling_config:
            hostname: "{{.Target}}"
{{- if .Baggage}}
            headers_to_add:
            - header: {key: baggage, value: "{{.Baggage}}"}
{{- end}}
{{- else}}
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: relay
          codec_type: HTTP2
          http2_protocol_options: {allow_connect: true}
          stream_idle_timeout: 0s
          upgrade_configs: [{upgrade_type: CONNECT}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["{{.Target}}"]
              routes:
              - match: {connect_matcher: {}}
                route:
                  cluster: next
                  timeout: 0s
                  idle_timeout: 0s
                  upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            alpn_protocols: [h2]
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            tls_certificates: [{certificate_chain: {filename: "{{.Cert}}"}, private_key: {filename: "{{.Key}}"}}]
            validation_context: {trusted_ca: {filename: "{{.Root}}"}}
{{- end}}
  clusters:
  - name: next
    type: STATIC
    connect_timeout: 10s
    circuit_breakers: {thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}]}
    load_assignment:
      cluster_name: next
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: "{{.Dial.Addr}}", port_value: {{.Dial.Port}}}}}}]}]
{{- if .Peer}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {allow_connect: true}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          alpn_protocols: [h2]
          tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
          tls_certificates: [{certificate_chain: {filename: "{{.Cert}}"}, private_key: {filename: "{{.Key}}"}}]
          validation_context:
            trusted_ca: {filename: "{{.Root}}"}
            match_typed_subject_alt_names: [{san_type: {{.SAN}}, matcher: {exact: "{{.Peer}}"}}]
{{- end}}
`))
