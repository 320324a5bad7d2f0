package yardstick

import (
	"os/exec"
	"text/template"
)

// Envoy is a pair of Envoys that speak HBONE, as a sidecar and a waypoint do.
type Envoy struct{ binary string }

// FindEnvoy looks for the program; path may be empty.
func FindEnvoy(path string) (Envoy, error) {
	binary, err := find("envoy", path, "make peers, or set RACEWAY_ENVOY to $(hbone/interop/install-envoy.sh DIR)")
	return Envoy{binary}, err
}

// Version is the release, as 1.40.0.
func (e Envoy) Version() string { return versionOf(e.binary, "--version") }

// Both sides' circuit breakers are opened: the default ones stop at 1,024 connections.
var envoyConfig = template.Must(template.New("envoy").Parse(`
static_resources:
  listeners:
  - name: relay
    address: {socket_address: {address: "{{.Listen.Addr}}", port_value: {{.Listen.Port}}}}
    filter_chains:
{{- if eq .Side "client"}}
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: relay
          cluster: next
          idle_timeout: 0s
          tunneling_config: {hostname: "{{.Application}}"}
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
              domains: ["{{.Application}}"]
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
{{- if eq .Side "client"}}
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
            match_typed_subject_alt_names: [{san_type: DNS, matcher: {exact: "{{.Peer}}"}}]
{{- end}}
`))

// Command is part of Pair.
func (e Envoy) Command(dir string, side Side, path Path) (*exec.Cmd, error) {
	config, err := render(envoyConfig, "envoy.yaml", dir, side, path)
	if err != nil {
		return nil, err
	}
	return exec.Command(e.binary, "-c", config, "--disable-hot-restart", "--log-level", "error"), nil
}
