package kube

import (
	"encoding/json"
	"fmt"
	"maps"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// policy is what of a policy is not in the Set.
type policy struct {
	raw             json.RawMessage // as written: for the file of the last good snapshot
	uid             string
	resourceVersion string
	generation      int64
	conditions      []any // of its status, whoever wrote them
}

// readPolicy decodes a policy from its JSON, so that what is not understood is seen.
func (i *item) readPolicy(in *unstructured.Unstructured) error {
	doc := maps.Clone(in.Object)
	delete(doc, "status")
	meta := map[string]any{"name": in.GetName(), "namespace": in.GetNamespace()}
	if written, ok := doc["metadata"].(map[string]any); ok {
		for _, field := range []string{"uid", "creationTimestamp", "annotations"} {
			if value, there := written[field]; there {
				meta[field] = value
			}
		}
	}
	if annotations, ok := meta["annotations"].(map[string]any); ok {
		annotations = maps.Clone(annotations)
		// kubectl's copy of the whole object doubles it.
		delete(annotations, "kubectl.kubernetes.io/last-applied-configuration")
		meta["annotations"] = annotations
	}
	doc["metadata"] = meta
	raw, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	typ := object.TypeMeta{APIVersion: in.GetAPIVersion(), Kind: in.GetKind()}
	if i.object, err = object.Decode(typ, raw); err != nil {
		return err
	}
	// What is no list is overwritten.
	conditions, _, _ := unstructured.NestedSlice(in.Object, "status", "conditions")
	i.policy = &policy{
		raw: raw, uid: i.uid, resourceVersion: in.GetResourceVersion(),
		generation: in.GetGeneration(), conditions: conditions,
	}
	return nil
}

// condition returns ours among the conditions of a policy.
func (p *policy) condition() (found metav1.Condition, there bool) {
	for _, c := range p.conditions {
		fields, ok := c.(map[string]any)
		if !ok || fields["type"] != conditionEnforced {
			continue
		}
		raw, err := json.Marshal(fields)
		if err != nil || json.Unmarshal(raw, &found) != nil {
			return metav1.Condition{}, true
		}
		return found, true
	}
	return metav1.Condition{}, false
}
