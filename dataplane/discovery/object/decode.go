package object

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8sjson "k8s.io/apimachinery/pkg/util/json"
)

// ErrIgnored marks an object of a kind that the data plane does not read.
var ErrIgnored = errors.New("kind is not read")

// API groups of what is read.
const (
	groupCore      = ""
	groupDiscovery = "discovery.k8s.io"
	groupSecurity  = "security.istio.io"
)

// TypeMeta says what an object is.
type TypeMeta struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

func (t TypeMeta) String() string { return t.APIVersion + " " + t.Kind }

func (t TypeMeta) group() (group, version string) {
	group, version, found := strings.Cut(t.APIVersion, "/")
	if !found {
		return groupCore, t.APIVersion
	}
	return group, version
}

// Decode reads one object, which says in typ and in itself what it is. Core kinds are read
// as the API server's clients read them, so a newer cluster's unknown fields do not matter;
// policies are read strictly, and one that cannot be read as written is still returned, as
// Invalid. An error wraps ErrIgnored when the object's kind is none of ours.
func Decode(typ TypeMeta, raw []byte) (Object, error) {
	kind, err := kindOf(typ)
	if err != nil {
		return Object{}, err
	}
	switch kind {
	case KindNamespace:
		return decodeTyped(raw, FromNamespace)
	case KindNode:
		return decodeTyped(raw, FromNode)
	case KindPod:
		return decodeTyped(raw, FromPod)
	case KindService:
		return decodeTyped(raw, FromService)
	case KindEndpointSlice:
		return decodeTyped(raw, FromEndpointSlice)
	case KindAuthorizationPolicy:
		return decodePolicy(raw, decodeAuthorization)
	default:
		return decodePolicy(raw, decodeAuthentication)
	}
}

// kindOf knows a kind by its group; a version of it that is not understood is an error
// rather than ignored, because the object is meant for us. So is an unknown kind beside the
// policies: it may be a policy with its kind misspelt.
func kindOf(typ TypeMeta) (Kind, error) {
	group, version := typ.group()
	kind, understood := Kind(typ.Kind), version == "v1"
	switch group {
	case groupCore:
		if kind != KindNamespace && kind != KindNode && kind != KindPod && kind != KindService {
			return "", fmt.Errorf("%s: %w", typ, ErrIgnored)
		}
	case groupDiscovery:
		if kind != KindEndpointSlice {
			return "", fmt.Errorf("%s: %w", typ, ErrIgnored)
		}
	case groupSecurity:
		if kind == "RequestAuthentication" {
			return "", fmt.Errorf("%s: %w", typ, ErrIgnored)
		}
		if !kind.IsPolicy() {
			return "", fmt.Errorf("%s: no such kind; if it is a policy, it would not be in force", typ)
		}
		understood = understood || version == "v1beta1"
	default:
		return "", fmt.Errorf("%s: %w", typ, ErrIgnored)
	}
	if !understood {
		return "", fmt.Errorf("%s: its version %s is not understood", typ, version)
	}
	return kind, nil
}

func decodeTyped[T corev1.Namespace | corev1.Node | corev1.Pod | corev1.Service | discoveryv1.EndpointSlice](
	raw []byte, convert func(*T) (Object, error),
) (Object, error) {
	var in T
	if err := k8sjson.Unmarshal(raw, &in); err != nil {
		return Object{}, err
	}
	return convert(&in)
}

func decodePolicy(raw []byte, convert func(*metav1.ObjectMeta, map[string]json.RawMessage) (Object, error)) (Object, error) {
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(raw, &doc); err != nil {
		return Object{}, err
	}
	var meta metav1.ObjectMeta
	if len(doc["metadata"]) > 0 {
		if err := k8sjson.Unmarshal(doc["metadata"], &meta); err != nil {
			return Object{}, fmt.Errorf("metadata: %w", err)
		}
	}
	return convert(&meta, doc)
}
