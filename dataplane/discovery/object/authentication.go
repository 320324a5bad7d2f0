package object

import (
	"encoding/json"
	"maps"
	"slices"

	security "istio.io/api/security/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/dataplane"
)

// FromPeerAuthentication converts a PeerAuthentication of any of its API versions. As with
// FromAuthorizationPolicy, Decode is stricter.
func FromPeerAuthentication(meta *metav1.ObjectMeta, spec *security.PeerAuthentication) (Object, error) {
	out, key, err := newAuthentication(meta)
	if err != nil {
		return Object{}, err
	}
	out.Invalid = joinCauses(readAuthentication(&out, spec))
	return Object{Key: key, value: out}, nil
}

func decodeAuthentication(meta *metav1.ObjectMeta, doc map[string]json.RawMessage) (Object, error) {
	out, key, err := newAuthentication(meta)
	if err != nil {
		return Object{}, err
	}
	causes := unknownFields(doc)
	spec := new(security.PeerAuthentication)
	if err := decodeSpec(doc["spec"], spec); err != nil {
		causes = append(causes, err)
		out.Selector, _ = salvageSelector(doc["spec"])
	} else {
		causes = append(causes, readAuthentication(&out, spec)...)
	}
	out.Invalid = joinCauses(causes)
	return Object{Key: key, value: out}, nil
}

func newAuthentication(meta *metav1.ObjectMeta) (dataplane.PeerAuthentication, Key, error) {
	name, err := namespacedName(meta)
	if err != nil {
		return dataplane.PeerAuthentication{}, Key{}, err
	}
	out := dataplane.PeerAuthentication{Name: name, CreatedAt: meta.CreationTimestamp.UTC()}
	return out, Key{Kind: KindPeerAuthentication, Name: name}, nil
}

func readAuthentication(out *dataplane.PeerAuthentication, spec *security.PeerAuthentication) []error {
	var c complaints
	out.Selector = c.selector(spec.GetSelector())
	out.Mode = c.mode("spec.mtls.mode", spec.GetMtls())
	ports := spec.GetPortLevelMtls()
	if len(ports) > 0 && len(out.Selector) == 0 {
		c.addf("spec.portLevelMtls: needs a selector")
	}
	for _, number := range slices.Sorted(maps.Keys(ports)) {
		if number < 1 || number > 65535 {
			c.addf("spec.portLevelMtls: %d is not a port", number)
			continue
		}
		if out.PortModes == nil {
			out.PortModes = make(map[uint16]dataplane.MTLSMode)
		}
		out.PortModes[uint16(number)] = c.mode("spec.portLevelMtls", ports[number])
	}
	return c.found
}

func (c *complaints) mode(field string, in *security.PeerAuthentication_MutualTLS) dataplane.MTLSMode {
	switch in.GetMode() {
	case security.PeerAuthentication_MutualTLS_UNSET:
		return dataplane.MTLSUnset
	case security.PeerAuthentication_MutualTLS_DISABLE:
		return dataplane.MTLSDisable
	case security.PeerAuthentication_MutualTLS_PERMISSIVE:
		return dataplane.MTLSPermissive
	case security.PeerAuthentication_MutualTLS_STRICT:
		return dataplane.MTLSStrict
	default:
		c.addf("%s: %d is unknown", field, in.GetMode())
		return dataplane.MTLSStrict
	}
}
