package yardstick

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"text/template"
)

// HAProxy is a pair of HAProxy in TCP mode with mutual TLS on the link. It resumes TLS
// sessions, as it does unless told otherwise.
type HAProxy struct{ binary string }

// FindHAProxy looks for the program; path may be empty.
func FindHAProxy(path string) (HAProxy, error) {
	binary, err := find("haproxy", path, "apt-get install haproxy")
	return HAProxy{binary}, err
}

// Version is the release, as 2.6.12.
func (h HAProxy) Version() string { return versionOf(h.binary, "-v") }

// The pair's settings for TLS are on the lines that need them: of the client's side on
// `server`, of the server's on `bind`.
var haproxyConfig = template.Must(template.New("haproxy").Parse(`defaults
	mode tcp
	option splice-auto
	timeout connect 10s
	timeout client 1h
	timeout server 1h
listen relay
{{- if eq .Side "client"}}
	bind {{.Listen}}
	server next {{.Dial}} ssl verify required verifyhost {{.Peer}} ca-file {{.Root}} crt {{.Pair}} ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256
{{- else}}
	bind {{.Listen}} ssl crt {{.Pair}} ca-file {{.Root}} verify required ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256
	server next {{.Dial}}
{{- end}}
`))

// Command is part of Pair.
func (h HAProxy) Command(dir string, side Side, path Path) (*exec.Cmd, error) {
	config, err := render(dir, side, path)
	if err != nil {
		return nil, err
	}
	return exec.Command(h.binary, "-db", "-f", config), nil
}

// render writes a side's configuration and returns its path.
func render(dir string, side Side, path Path) (string, error) {
	listen, dial := path.hop(side)
	var text bytes.Buffer
	err := haproxyConfig.Execute(&text, map[string]any{
		"Side": string(side), "Listen": listen, "Dial": dial, "Peer": ServerSide.name(),
		"Root": rootFile(dir), "Pair": pairFile(dir, side),
	})
	if err != nil {
		return "", fmt.Errorf("write the configuration: %w", err)
	}
	file := filepath.Join(dir, string(side)+"-haproxy.cfg")
	if err := os.WriteFile(file, text.Bytes(), 0o600); err != nil {
		return "", fmt.Errorf("write the configuration: %w", err)
	}
	return file, nil
}

// release is how both programs write theirs.
var release = regexp.MustCompile(`\d+\.\d+\.\d+`)

// versionOf asks a program for its release.
func versionOf(binary string, args ...string) string {
	output, err := exec.Command(binary, args...).Output()
	if err != nil {
		return "unknown"
	}
	return string(release.Find(output))
}
