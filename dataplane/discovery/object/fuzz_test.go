package object

import (
	"encoding/json"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Whatever a policy's spec is, the policy stays in the snapshot with an action that is
// known, and what is read without complaint has nothing in it that matches by being empty.
func FuzzAuthorizationPolicy(f *testing.F) {
	for _, seed := range []string{
		`{}`, `null`, `[]`, `{"rules":[{}]}`,
		`{"action":"DENY","rules":[{"from":[{"source":{"principals":["a"],"ipBlocks":["10.0.0.0/8"]}}]}]}`,
		`{"action":"DENY","rules":[{"to":[{"operation":{"ports":["80"]}}],"when":[{"key":"source.ip","values":["::1"]}]}]}`,
		`{"selector":{"matchLabels":{"app":"db"}},"action":7}`,
		`{"targetRefs":[{"kind":"Gateway","name":"w"}],"rules":[{"from":[]}]}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		if !json.Valid([]byte(spec)) {
			return
		}
		o, err := Decode(TypeMeta{"security.istio.io/v1", "AuthorizationPolicy"}, []byte(`{"metadata":{"name":"p"},"spec":`+spec+`}`))
		if err != nil {
			t.Fatalf("the policy is lost: %v", err)
		}
		p := o.value.(dataplane.AuthorizationPolicy)
		switch p.Action {
		case dataplane.ActionAllow, dataplane.ActionDeny, dataplane.ActionAudit, dataplane.ActionCustom:
		default:
			t.Fatalf("action = %q", p.Action)
		}
		if p.Invalid != "" {
			return
		}
		for _, r := range p.Rules {
			for _, s := range r.From {
				n := len(s.Principals) + len(s.NotPrincipals) + len(s.Namespaces) + len(s.NotNamespaces) +
					len(s.ServiceAccounts) + len(s.NotServiceAccounts) +
					len(s.IPBlocks) + len(s.NotIPBlocks) + len(s.RemoteIPBlocks) + len(s.NotRemoteIPBlocks) +
					len(s.RequestPrincipals) + len(s.NotRequestPrincipals)
				if n == 0 {
					t.Fatalf("a source matches everything: %s", spec)
				}
			}
			for _, o := range r.To {
				if len(o.Ports)+len(o.NotPorts)+len(o.Hosts)+len(o.NotHosts)+len(o.Methods)+len(o.NotMethods)+len(o.Paths)+len(o.NotPaths) == 0 {
					t.Fatalf("an operation matches everything: %s", spec)
				}
			}
		}
	})
}

func FuzzPeerAuthentication(f *testing.F) {
	f.Add(`{"mtls":{"mode":"STRICT"},"selector":{"matchLabels":{"a":"b"}},"portLevelMtls":{"80":{"mode":"DISABLE"}}}`)
	f.Add(`{"portLevelMtls":{"0":null}}`)
	f.Fuzz(func(t *testing.T, spec string) {
		if !json.Valid([]byte(spec)) {
			return
		}
		o, err := Decode(TypeMeta{"security.istio.io/v1", "PeerAuthentication"}, []byte(`{"metadata":{"name":"p"},"spec":`+spec+`}`))
		if err != nil {
			t.Fatalf("the policy is lost: %v", err)
		}
		if p := o.value.(dataplane.PeerAuthentication); p.PortModes[0] != "" {
			t.Fatalf("port 0 has a mode: %s", spec)
		}
	})
}
