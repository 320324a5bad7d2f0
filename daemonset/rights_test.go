package daemonset_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	rbacv1 "k8s.io/api/rbac/v1"
)

// rights are what an account may do: one line for each verb on each resource, with where and
// the names when they are limited.
func rights(objects []object, account string) []string {
	var all []string
	add := func(where string, rules []rbacv1.PolicyRule) {
		for _, rule := range rules {
			for _, group := range rule.APIGroups {
				for _, resource := range rule.Resources {
					for _, verb := range rule.Verbs {
						all = append(all, strings.TrimSpace(fmt.Sprintf("%s %q %s %s %s", where, group, resource, verb, strings.Join(rule.ResourceNames, ","))))
					}
				}
			}
		}
	}
	for _, o := range objects {
		switch binding := o.typed.(type) {
		case *rbacv1.ClusterRoleBinding:
			if isFor(binding.Subjects, account) {
				add("cluster", find[*rbacv1.ClusterRole](objects, binding.RoleRef.Name).Rules)
			}
		case *rbacv1.RoleBinding:
			if isFor(binding.Subjects, account) {
				add(binding.Namespace, find[*rbacv1.Role](objects, binding.RoleRef.Name).Rules)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func isFor(subjects []rbacv1.Subject, account string) bool {
	return len(subjects) == 1 && subjects[0].Kind == "ServiceAccount" && subjects[0].Name == account && subjects[0].Namespace == "raceway-system"
}

func TestNobodyHasMoreRightsThanTheyUse(t *testing.T) {
	objects := render(t, "chart")
	for account, want := range map[string][]string{
		"raceway-agent": documentedRights(t),
		"raceway-ca": {
			`cluster "" pods get`, `cluster "" pods list`, `cluster "" pods watch`,
			`cluster "authentication.k8s.io" tokenreviews create`,
			`raceway-system "" configmaps create`,
			`raceway-system "" configmaps get raceway-ca-root`, `raceway-system "" configmaps list raceway-ca-root`,
			`raceway-system "" configmaps patch raceway-ca-root`, `raceway-system "" configmaps watch raceway-ca-root`,
			`raceway-system "" secrets create`,
			`raceway-system "" secrets get raceway-ca`, `raceway-system "" secrets list raceway-ca`, `raceway-system "" secrets watch raceway-ca`,
		},
		"raceway-cni": {`cluster "" namespaces get`, `cluster "" pods get`},
		"raceway-uninstall": {
			`cluster "" nodes list`, `cluster "" pods list`, `cluster "" pods patch`, `raceway-system "" configmaps patch raceway`,
		},
	} {
		if got := rights(objects, account); !slices.Equal(got, want) {
			t.Errorf("%s may\n%s\nand should\n%s", account, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// documentedRights are those of the table in the package that uses them.
func documentedRights(t *testing.T) []string {
	t.Helper()
	source, err := os.ReadFile("../dataplane/discovery/kube/doc.go")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile(`(?m)^//\t(cluster|agent's namespace|mesh config's ns) +(\S+) +(\S+)(?: (raceway-\S+|\(its name only\)))? +((?:(?:get|list|watch|create|update|patch)\b ?)+)`)
	var all []string
	for _, m := range row.FindAllStringSubmatch(string(source), -1) {
		where, group, resource, name := m[1], strings.Trim(m[2], `"`), m[3], m[4]
		if where != "cluster" {
			where = "raceway-system"
		}
		if name == "(its name only)" {
			name = "raceway"
		}
		for verb := range strings.FieldsSeq(m[5]) {
			all = append(all, strings.TrimSpace(fmt.Sprintf("%s %q %s %s %s", where, group, resource, verb, name)))
		}
	}
	if len(all) < 10 {
		t.Fatalf("the table of rights is not found: %q", all)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func TestRightsAreNamedOneByOne(t *testing.T) {
	eachVariant(t, func(t *testing.T, objects []object) {
		for _, o := range objects {
			var rules []rbacv1.PolicyRule
			switch role := o.typed.(type) {
			case *rbacv1.ClusterRole:
				rules = role.Rules
			case *rbacv1.Role:
				rules = role.Rules
			}
			for _, rule := range rules {
				for _, word := range slices.Concat(rule.APIGroups, rule.Resources, rule.Verbs) {
					if strings.Contains(word, "*") || slices.Contains([]string{"escalate", "bind", "impersonate"}, word) {
						t.Errorf("%s %s: %q", o.GetKind(), o.GetName(), word)
					}
				}
				if slices.Contains(rule.Resources, "secrets") && o.GetName() != "raceway-ca" {
					t.Errorf("%s %s: Secrets", o.GetKind(), o.GetName())
				}
			}
		}
	})
}

// TestAgentsThatMayPatchAreHeldToTheirNode: the roles let them patch every pod and node.
func TestAgentsThatMayPatchAreHeldToTheirNode(t *testing.T) {
	objects := render(t, "chart")
	for _, policy := range []string{"raceway-agent-pods", "raceway-agent-nodes"} {
		for _, kind := range []string{"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"} {
			if !slices.ContainsFunc(objects, func(o object) bool { return o.GetKind() == kind && o.GetName() == policy }) {
				t.Errorf("there is no %s %s", kind, policy)
			}
		}
	}
	withoutTaint := render(t, "chart", variants()["little"]...)
	if slices.Contains(rights(withoutTaint, "raceway-agent"), `cluster "" nodes patch`) {
		t.Error("agents may patch nodes although there is no taint to remove")
	}
}

// TestAdmissionFailsClosed: a policy that cannot be evaluated refuses, and none only warns.
func TestAdmissionFailsClosed(t *testing.T) {
	eachVariant(t, func(t *testing.T, objects []object) {
		for _, o := range objects {
			switch p := o.typed.(type) {
			case *admissionregistrationv1.ValidatingAdmissionPolicy:
				if f := p.Spec.FailurePolicy; f == nil || *f != admissionregistrationv1.Fail {
					t.Errorf("%s does not fail closed", p.Name)
				}
			case *admissionregistrationv1.ValidatingAdmissionPolicyBinding:
				if !slices.Equal(p.Spec.ValidationActions, []admissionregistrationv1.ValidationAction{admissionregistrationv1.Deny}) {
					t.Errorf("%s does not deny", p.Name)
				}
			}
		}
	})
	if !slices.ContainsFunc(render(t, "chart"), func(o object) bool {
		return o.GetKind() == "ValidatingAdmissionPolicyBinding" && o.GetName() == "raceway-probe-hosts"
	}) {
		t.Error("the kubelet's probes can be sent anywhere by default")
	}
}

func TestCAMakesNoSecretWhenOneIsGiven(t *testing.T) {
	got := rights(render(t, "chart", variants()["own root"]...), "raceway-ca")
	if slices.Contains(got, `raceway-system "" secrets create`) || !slices.Contains(got, `raceway-system "" secrets get cacerts`) {
		t.Errorf("rights\n%s", strings.Join(got, "\n"))
	}
}
