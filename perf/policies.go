package perf

import (
	"fmt"
	"strings"
)

// rulesPerPolicy is as many as people write into one.
const rulesPerPolicy = 100

// manyPolicies are AuthorizationPolicies with that many rules, each of which allows somebody
// else, and one more that allows the client: what is decided has to look at all of them.
func manyPolicies(rules int) string {
	var all strings.Builder
	header := func(name string) {
		fmt.Fprintf(&all, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: %s, name: %s}\nspec:\n  action: ALLOW\n  rules:\n", namespace, name)
	}
	for i := range rules {
		if i%rulesPerPolicy == 0 {
			header(fmt.Sprintf("others-%d", i/rulesPerPolicy))
		}
		fmt.Fprintf(&all, "  - from: [{source: {principals: [cluster.local/ns/others/sa/caller-%d]}}]\n    to: [{operation: {ports: ['%d']}}]\n", i, serverPort)
	}
	header("the-client")
	fmt.Fprintf(&all, "  - from: [{source: {principals: [cluster.local/ns/%s/sa/default]}}]\n", namespace)
	return all.String()
}
