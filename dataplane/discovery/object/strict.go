package object

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1beta1"

	"github.com/raceway-mesh/raceway/dataplane"
)

// protoNoise is what protojson puts before a cause: its own name (followed by either kind of
// space, on purpose) and a place in JSON that nobody wrote.
var protoNoise = regexp.MustCompile(`^proto:[\s\x{a0}]*(?:syntax error )?(?:\(line \d+:\d+\): )?`)

// decodeSpec reads a spec strictly: an unknown field is an error, and so is a repeated one.
// A policy without a spec is one with an empty spec, as in Istio.
func decodeSpec(raw json.RawMessage, spec proto.Message) error {
	if len(raw) == 0 || string(raw) == "null" {
		return nil
	}
	if err := (protojson.UnmarshalOptions{}).Unmarshal(raw, spec); err != nil {
		return errors.New("spec: " + protoNoise.ReplaceAllString(err.Error(), ""))
	}
	return nil
}

// unknownFields finds what stands beside spec and would be lost: `specs:`, or rules that
// were not indented.
func unknownFields(doc map[string]json.RawMessage) []error {
	var found []error
	for _, field := range slices.Sorted(maps.Keys(doc)) {
		switch field {
		case "apiVersion", "kind", "metadata", "spec", "status":
		default:
			found = append(found, fmt.Errorf("unknown field %q beside spec", field))
		}
	}
	return found
}

// emptyClauses finds what the typed form cannot tell from absence: a `from:`, `to:` or
// `when:` that is there with nothing in it would match everything, and its author meant the
// contrary. Istio rejects it too.
func emptyClauses(spec json.RawMessage) []error {
	var in struct {
		Rules []map[string]json.RawMessage `json:"rules"`
	}
	if len(spec) == 0 || json.Unmarshal(spec, &in) != nil {
		return nil // decodeSpec says why
	}
	var found []error
	for i, rule := range in.Rules {
		if rule == nil {
			found = append(found, fmt.Errorf("spec.rules[%d]: null; for every connection write {}", i))
		}
		for _, clause := range [...]string{"from", "to", "when"} {
			raw, there := rule[clause]
			if !there {
				continue
			}
			var items []json.RawMessage
			if json.Unmarshal(raw, &items) == nil && len(items) == 0 {
				found = append(found, fmt.Errorf("spec.rules[%d].%s: empty; leave it out to match everything", i, clause))
			}
		}
	}
	return found
}

// salvage fills in what can be told of a spec that cannot be read as a whole.
func salvage(out *dataplane.AuthorizationPolicy, spec json.RawMessage) {
	out.Action = salvageAction(spec)
	selector, there := salvageSelector(spec)
	out.Selector = selector
	out.TargetRefs = !there && salvageTargetRefs(spec)
}

// salvageAction tells the action; one that is itself unreadable may have been any, of which
// Deny is the strictest.
func salvageAction(spec json.RawMessage) dataplane.PolicyAction {
	var in map[string]json.RawMessage
	if json.Unmarshal(spec, &in) != nil {
		return dataplane.ActionDeny
	}
	raw, there := in["action"]
	if !there {
		return dataplane.ActionAllow
	}
	var name string
	if json.Unmarshal(raw, &name) != nil {
		return dataplane.ActionDeny
	}
	number, known := security.AuthorizationPolicy_Action_value[name]
	if !known {
		return dataplane.ActionDeny
	}
	action, _ := actionOf(security.AuthorizationPolicy_Action(number))
	return action
}

// salvageSelector tells the selector, and whether there is anything in its place. Unless it
// is whole, the policy selects every workload of its scope: the strictest that was meant.
func salvageSelector(spec json.RawMessage) (labels map[string]string, there bool) {
	var in struct {
		Selector json.RawMessage `json:"selector"`
	}
	if json.Unmarshal(spec, &in) != nil || len(in.Selector) == 0 {
		return nil, false
	}
	var selector struct {
		MatchLabels map[string]string `json:"matchLabels"`
	}
	decoder := json.NewDecoder(bytes.NewReader(in.Selector))
	decoder.DisallowUnknownFields()
	if decoder.Decode(&selector) != nil {
		return nil, true
	}
	return selector.MatchLabels, true
}

// salvageTargetRefs tells whether the policy is plainly one of a waypoint or gateway.
func salvageTargetRefs(spec json.RawMessage) bool {
	type reference struct {
		Kind string `json:"kind"`
		Name string `json:"name"`
	}
	var in struct {
		TargetRef  *reference  `json:"targetRef"`
		TargetRefs []reference `json:"targetRefs"`
	}
	if json.Unmarshal(spec, &in) != nil {
		return false
	}
	if in.TargetRef != nil {
		in.TargetRefs = append(in.TargetRefs, *in.TargetRef)
	}
	for _, ref := range in.TargetRefs {
		if ref.Kind == "" || ref.Name == "" {
			return false
		}
	}
	return len(in.TargetRefs) > 0
}
