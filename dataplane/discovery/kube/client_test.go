package kube

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
)

// apiServer notes what it is asked, and answers by path.
type apiServer struct {
	answers map[string]any
	mu      sync.Mutex
	asked   []string
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	a.asked = append(a.asked, fmt.Sprintf("%s %s %s", r.Method, r.URL.RequestURI(), r.Header.Get("Content-Type")))
	a.mu.Unlock()
	answer := a.answers[r.URL.Path]
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.URL.Query().Get("watch") != "":
		_ = json.NewEncoder(w).Encode(map[string]any{"type": "ADDED", "object": answer})
	case answer == nil && len(body) > 0:
		_, _ = w.Write(body)
	case answer == nil:
		w.WriteHeader(http.StatusNotFound)
		_ = json.NewEncoder(w).Encode(apierrors.NewNotFound(corev1.Resource("things"), "x").Status())
	default:
		_ = json.NewEncoder(w).Encode(answer)
	}
}

func TestServerIsAskedAsClientGoAsks(t *testing.T) {
	pod := running("web", "node-1", "10.0.0.1")
	pod.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	api := &apiServer{answers: map[string]any{
		"/api/v1/namespaces/shop/pods/web": pod,
		"/api/v1/pods":                     &corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, Items: []corev1.Pod{*pod}},
		"/api/v1/namespaces/shop/pods":     pod,
		"/apis":                            &metav1.APIGroupList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIGroupList"}, Groups: []metav1.APIGroup{{Name: policyGroup}}},
	}}
	listening := httptest.NewServer(api)
	defer listening.Close()
	client, err := newServer(&rest.Config{Host: listening.URL, QPS: 100, Burst: 100})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := client.Pods("shop").Get(t.Context(), "web", metav1.GetOptions{}); err != nil || got.UID != pod.UID {
		t.Errorf("get: %v, %v", got, err)
	}
	if list, err := client.Pods("").List(t.Context(), metav1.ListOptions{ResourceVersion: "0"}); err != nil || len(list.Items) != 1 {
		t.Errorf("list: %v, %v", list, err)
	}
	watched, err := client.Pods("shop").Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=web"})
	if err != nil {
		t.Fatal(err)
	}
	if e := <-watched.ResultChan(); e.Object.(*corev1.Pod).UID != pod.UID {
		t.Errorf("watched %+v", e)
	}
	watched.Stop()
	if _, err := client.Pods("shop").Patch(t.Context(), "web", types.MergePatchType, []byte("{}"), metav1.PatchOptions{}); err != nil {
		t.Error("patch:", err)
	}
	held := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "l"}}
	if got, err := client.Leases("shop").Update(t.Context(), held, metav1.UpdateOptions{}); err != nil || got.Name != "l" {
		t.Errorf("update: %v, %v", got, err)
	}
	if _, err := client.Events("shop").Create(t.Context(), &eventsv1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e"}}, metav1.CreateOptions{FieldManager: "f"}); err != nil {
		t.Error("create:", err)
	}
	if got, err := client.Namespaces().Get(t.Context(), "none", metav1.GetOptions{}); !apierrors.IsNotFound(err) || got != nil {
		t.Errorf("what is not there: %v, %v", got, err)
	}
	if groups, err := client.ServerGroupsWithContext(t.Context()); err != nil || len(groups.Groups) != 1 {
		t.Errorf("groups: %v, %v", groups, err)
	}
	if _, err := client.ServerResourcesForGroupVersionWithContext(t.Context(), policyGroup+"/v1"); !apierrors.IsNotFound(err) {
		t.Errorf("kinds of a group that is not there: %v", err)
	}
	want := []string{
		"GET /api/v1/namespaces/shop/pods/web ",
		"GET /api/v1/pods?resourceVersion=0 ",
		"GET /api/v1/namespaces/shop/pods?fieldSelector=metadata.name%3Dweb&watch=true ",
		"PATCH /api/v1/namespaces/shop/pods/web application/merge-patch+json",
		"PUT /apis/coordination.k8s.io/v1/namespaces/shop/leases/l application/json",
		"POST /apis/events.k8s.io/v1/namespaces/shop/events?fieldManager=f application/json",
		"GET /api/v1/namespaces/none ",
		"GET /apis ",
		"GET /apis/security.istio.io/v1 ",
	}
	if !slices.Equal(api.asked, want) {
		t.Errorf("asked\n%q, want\n%q", api.asked, want)
	}
}

// Every kind that is watched can be read as protobuf, in which the API server is asked for it.
func TestKnownKindsReadProtobuf(t *testing.T) {
	protobuf := func(s *runtime.Scheme) runtime.Serializer {
		for _, info := range codecs(s).SupportedMediaTypes() {
			if info.MediaType == runtime.ContentTypeProtobuf {
				return info.Serializer
			}
		}
		t.Fatal("no protobuf")
		return nil
	}
	for _, o := range []runtime.Object{
		&corev1.NodeList{}, &corev1.PodList{}, &corev1.NamespaceList{}, &corev1.ServiceList{}, &corev1.ConfigMapList{},
		&discoveryv1.EndpointSliceList{}, &coordinationv1.Lease{}, &eventsv1.Event{},
	} {
		kinds, _, err := scheme.Scheme.ObjectKinds(o)
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := runtime.Encode(codecs(scheme.Scheme).EncoderForVersion(protobuf(scheme.Scheme), kinds[0].GroupVersion()), o)
		if err != nil {
			t.Fatal(err)
		}
		got, err := runtime.Decode(codecs(knownKinds()).DecoderToVersion(protobuf(knownKinds()), kinds[0].GroupVersion()), encoded)
		if err != nil || fmt.Sprintf("%T", got) != fmt.Sprintf("%T", o) {
			t.Errorf("%T: %T, %v", o, got, err)
		}
	}
}
