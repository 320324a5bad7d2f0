package object

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/raceway-mesh/raceway/dataplane"
)

// maxUID bounds a UID. Kubernetes writes 36 characters.
const maxUID = 128

// clusterName is the name of an object without a namespace.
func clusterName(meta *metav1.ObjectMeta) (dataplane.Name, error) {
	if err := validName(meta.Name); err != nil {
		return dataplane.Name{}, err
	}
	return dataplane.Name{Name: meta.Name}, nil
}

// namespacedName defaults the namespace as kubectl does. Names become part of identities,
// paths and host names, so what the API server would reject is rejected here too.
func namespacedName(meta *metav1.ObjectMeta) (dataplane.Name, error) {
	n := dataplane.Name{Namespace: intern(meta.Namespace), Name: meta.Name}
	if n.Namespace == "" {
		n.Namespace = metav1.NamespaceDefault
	}
	if err := validName(n.Name); err != nil {
		return dataplane.Name{}, err
	}
	if complaints := validation.IsDNS1123Label(n.Namespace); len(complaints) > 0 {
		return dataplane.Name{}, fmt.Errorf("metadata.namespace %q: %s", n.Namespace, complaints[0])
	}
	return n, nil
}

func validName(name string) error {
	if name == "" {
		return fmt.Errorf("metadata.name is missing")
	}
	if complaints := validation.IsDNS1123Subdomain(name); len(complaints) > 0 {
		return fmt.Errorf("metadata.name %q: %s", name, complaints[0])
	}
	return nil
}

// validUID keeps a UID fit to be a directory's name, which on bpffs excludes dots.
func validUID(uid string) error {
	if len(uid) > maxUID {
		return fmt.Errorf("metadata.uid is longer than %d characters", maxUID)
	}
	for _, c := range uid {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		default:
			return fmt.Errorf("metadata.uid %q has the character %q", uid, c)
		}
	}
	return nil
}

// derivedUID stands in for the UID of a pod whose YAML has none: the same on every node and
// after every restart (an RFC 9562 version 8 UUID).
func derivedUID(n dataplane.Name) string {
	sum := sha256.Sum256([]byte("pod " + n.String()))
	b := sum[:16]
	b[6] = b[6]&0x0f | 0x80
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// parseAddr reads an address, unmapped. One with an IPv6 zone means nothing beyond its host.
func parseAddr(field, s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%s: %q is not an IP address", field, s)
	}
	if a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s: %q has an IPv6 zone", field, s)
	}
	return a.Unmap(), nil
}

// appendAddr adds a unless it is there.
func appendAddr(list []netip.Addr, a netip.Addr) []netip.Addr {
	for _, have := range list {
		if have == a {
			return list
		}
	}
	return append(list, a)
}

// parsePrefix reads a CIDR or a single address, as Istio's ipBlocks allow. A v4-mapped one
// becomes IPv4, since addresses are compared unmapped.
func parsePrefix(field, s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := parseAddr(field, s)
		if err != nil {
			return netip.Prefix{}, err
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s: %q is neither an IP address nor a CIDR", field, s)
	}
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, fmt.Errorf("%s: %q is a v4-mapped address with a prefix shorter than 96 bits", field, s)
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

func parsePort(field string, n int32) (uint16, error) {
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("%s: %d is not a port", field, n)
	}
	return uint16(n), nil
}
