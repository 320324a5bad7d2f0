package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/raceway-mesh/raceway/cni-plugin/install"
	"github.com/raceway-mesh/raceway/dataplane"
)

const (
	// apiTimeout is for both questions. An API server that is there answers in milliseconds.
	apiTimeout = 2 * time.Second
	// maxObjectBytes is more than an object can have in etcd.
	maxObjectBytes = 4 << 20
	// metadataOnly asks for labels without the rest of the object.
	metadataOnly = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
)

// errUninstalled says that the API server does not know the plugin's account any more.
var errUninstalled = errors.New("the service account of raceway-cni is gone")

// errNotFound says that there is no such object.
var errNotFound = errors.New("not found")

// podLabels is what decides on enrolment.
type podLabels struct{ namespace, pod map[string]string }

// ask reads the labels of a pod and of its namespace from the API server, in the way that
// needs no client library: the plugin starts for each pod.
func ask(ctx context.Context, api install.API, pod dataplane.Name) (found podLabels, err error) {
	if api.Server == "" {
		return found, errors.New("the API server's address is not known")
	}
	if expired(api, time.Now()) {
		return found, errors.New("the token for the API server has expired")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(api.CA)) {
		return found, errors.New("the API server's certificate authority is not known")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport:     transport,
		Timeout:       apiTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the token is for one server
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	path := api.Server + "/api/v1/namespaces/" + url.PathEscape(pod.Namespace)
	if found.namespace, err = get(ctx, client, path, api.Token); err != nil {
		if errors.Is(err, errUninstalled) {
			err = confirm(ctx, client, api.Server)
		}
		return found, err
	}
	found.pod, err = get(ctx, client, path+"/pods/"+url.PathEscape(pod.Name), api.Token)
	if errors.Is(err, errNotFound) {
		err = nil // a static pod that the API server has not been told of: its namespace decides
	}
	return found, err
}

// confirm returns errUninstalled unless the API server is unwell: one that cannot read its
// store does not know any account. Where nobody may ask without one, nothing speaks against it.
func confirm(ctx context.Context, client *http.Client, server string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server+"/readyz", nil)
	if err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	if resp.StatusCode >= http.StatusInternalServerError {
		err = fmt.Errorf("the API server takes no token and is not ready: it answered %s", resp.Status)
	} else {
		err = errUninstalled
	}
	return errors.Join(err, resp.Body.Close())
}

// get returns the labels of the object at address.
func get(ctx context.Context, client *http.Client, address, token string) (labels map[string]string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, fmt.Errorf("ask the API server: %w", err)
	}
	req.Header.Set("Accept", metadataOnly)
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("User-Agent", "raceway-cni")
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the API server: %w", err)
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusUnauthorized:
		return nil, errUninstalled
	case http.StatusNotFound:
		return nil, fmt.Errorf("ask the API server for %s: %w", req.URL.Path, errNotFound)
	default:
		return nil, fmt.Errorf("ask the API server for %s: it answered %s", req.URL.Path, resp.Status)
	}
	var object struct {
		Metadata struct {
			Labels map[string]string `json:"labels"`
		} `json:"metadata"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxObjectBytes)).Decode(&object); err != nil {
		return nil, fmt.Errorf("read the API server's answer to %s: %w", req.URL.Path, err)
	}
	// The rest of the body, so that the next question goes over the same connection.
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxObjectBytes))
	return object.Metadata.Labels, err
}
