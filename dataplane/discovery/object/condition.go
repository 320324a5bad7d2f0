package object

import (
	"strings"

	security "istio.io/api/security/v1beta1"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Keys that go on with the name of a header, a claim or a filter's metadata.
const (
	headerAttribute      = "request.headers["
	headerRegexAttribute = "request.regex.headers["
	claimAttribute       = "request.auth.claims["
	filterAttribute      = "experimental.envoy.filters."
)

// knownAttribute tells the keys that a condition may have
// (https://istio.io/latest/docs/reference/config/security/conditions/).
func knownAttribute(key string) bool {
	switch key {
	case "source.ip", "remote.ip", "source.namespace", "source.principal", "source.serviceAccount",
		"source.trustDomain", "destination.ip", "destination.port", "connection.sni",
		"request.auth.principal", "request.auth.audiences", "request.auth.presenter":
		return true
	}
	for _, prefix := range [...]string{headerAttribute, headerRegexAttribute, claimAttribute, filterAttribute} {
		if strings.HasPrefix(key, prefix) {
			return true
		}
	}
	return false
}

func (c *complaints) condition(field string, in *security.Condition) dataplane.PolicyCondition {
	out := dataplane.PolicyCondition{Key: in.GetKey(), Values: in.GetValues(), NotValues: in.GetNotValues()}
	switch {
	case out.Key == "":
		c.addf("%s.key: missing", field)
	case !knownAttribute(out.Key):
		c.addf("%s.key: %q is unknown", field, out.Key)
	}
	if len(out.Values)+len(out.NotValues) == 0 {
		c.addf("%s: neither values nor notValues", field)
	}
	c.conditionValues(field+".values", out.Key, out.Values)
	c.conditionValues(field+".notValues", out.Key, out.NotValues)
	return out
}

func (c *complaints) conditionValues(field, key string, values []string) {
	switch key {
	case "source.ip", "remote.ip", "destination.ip":
		c.prefixes(field, values)
	case "destination.port":
		c.ports(field, values)
	case "source.serviceAccount":
		c.serviceAccounts(field, values)
	default:
		c.values(field, values)
	}
}
