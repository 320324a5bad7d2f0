// Package daemonset_test renders the charts as users do and holds what comes of it to the
// programs, to Kubernetes' types and to the documentation.
package daemonset_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/yaml"
)

// variants are values with which the chart is rendered; what holds of it holds with each.
func variants() map[string][]string {
	return map[string][]string{
		"defaults": nil,
		"everything": {
			"--set", "imagePullSecrets[0].name=registry,enrollLabels[0]=istio.io/dataplane-mode",
			"--set", "agent.certTTL=1h,agent.kubeletCgroup=none,agent.sameNode=tunnel,agent.seLinuxOptions.type=spc_t,agent.extraArgs[0]=--tc=clsact",
			"--set", "agent.extraEnv[0].name=GOMEMLIMIT,agent.extraEnv[0].value=1GiB,agent.podLabels.a=b,agent.podAnnotations.a=b",
			"--set", "cni.apiServer=https://10.0.0.1:6443,ca.maxTTL=2h,ca.networkPolicy.enabled=true,ca.extraArgs[0]=--ttl=1h",
			"--set", "admission.protectRedirection=true,admission.forbidOptOut=true",
			"--set", "monitoring.podMonitor.enabled=true,monitoring.prometheusRule.enabled=true,monitoring.dashboard.enabled=true",
		},
		"little":      {"--set", "cni.enabled=false,agent.startupTaint=,agent.accessLog=false,uninstall.hook=false,admission.restrictAgents=false"},
		"external CA": {"--set", "ca.external.address=istiod.istio-system.svc:15012,ca.external.name=istiod.istio-system.svc"},
		"own root":    {"--set", "ca.secretName=cacerts,ca.generateRoot=false"},
	}
}

// helm is the path of the tool of .ci/tools, which is built when it has to be.
var helm = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("go", "tool", "-modfile=.ci/tools/go.mod", "-n", "helm")
	cmd.Dir = ".."
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
})

func runHelm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	path, err := helm()
	if err != nil {
		t.Fatalf("build helm: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG=/dev/null")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// object is one that the chart makes; typed is nil where Kubernetes has no type of it.
type object struct {
	*unstructured.Unstructured
	typed runtime.Object
}

func render(t *testing.T, chart string, args ...string) []object {
	t.Helper()
	out, err := runHelm(t, append([]string{"template", "raceway", chart, "--namespace", "raceway-system"}, args...)...)
	if err != nil {
		t.Fatalf("render %s: %v\n%s", chart, err, out)
	}
	var objects []object
	for document := range strings.SplitSeq(out, "\n---\n") {
		o, err := decode([]byte(document))
		if err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		if o.Unstructured != nil {
			objects = append(objects, o)
		}
	}
	if len(objects) == 0 {
		t.Fatalf("%s renders to nothing", chart)
	}
	return objects
}

// external are groups whose types are not Kubernetes' own.
var external = []string{"monitoring.coreos.com", "apiextensions.k8s.io"}

// decode refuses fields that the object's type does not have, and those that are there twice.
func decode(document []byte) (object, error) {
	content := map[string]any{}
	if err := yaml.UnmarshalStrict(document, &content); err != nil || len(content) == 0 {
		return object{}, err
	}
	o := object{Unstructured: &unstructured.Unstructured{Object: content}}
	for _, group := range external {
		if o.GroupVersionKind().Group == group {
			return o, nil
		}
	}
	typed, _, err := decoder().Decode(document, nil, nil)
	if err != nil {
		return object{}, fmt.Errorf("%s %s: %w", o.GetKind(), o.GetName(), err)
	}
	o.typed = typed
	return o, nil
}

var decoder = sync.OnceValue(func() runtime.Decoder {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		admissionregistrationv1.AddToScheme, appsv1.AddToScheme, batchv1.AddToScheme, corev1.AddToScheme,
		networkingv1.AddToScheme, policyv1.AddToScheme, rbacv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			panic(err) // a type is there twice
		}
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	return serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
})

// find returns the object of a type by its name, or nil.
func find[T runtime.Object](objects []object, name string) (found T) {
	for _, o := range objects {
		if typed, ok := o.typed.(T); ok && o.GetName() == name {
			return typed
		}
	}
	return found
}

// pods are the pod templates among the objects, by the name of what makes them.
func pods(objects []object) map[string]corev1.PodTemplateSpec {
	all := map[string]corev1.PodTemplateSpec{}
	for _, o := range objects {
		switch typed := o.typed.(type) {
		case *appsv1.DaemonSet:
			all[typed.Name] = typed.Spec.Template
		case *appsv1.Deployment:
			all[typed.Name] = typed.Spec.Template
		case *batchv1.Job:
			all[typed.Name] = typed.Spec.Template
		}
	}
	return all
}

// eachVariant runs test with what each of the variants renders to.
func eachVariant(t *testing.T, test func(t *testing.T, objects []object)) {
	for name, args := range variants() {
		t.Run(name, func(t *testing.T) { test(t, render(t, "chart", args...)) })
	}
}

func TestDecodeRefusesWhatKubernetesWouldIgnore(t *testing.T) {
	good := []byte("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: x\n")
	if _, err := decode(good); err != nil {
		t.Error(err)
	}
	for _, bad := range [][]byte{
		bytes.ReplaceAll(good, []byte("name"), []byte("nam")),
		append(bytes.Clone(good), "dat: {}\n"...),
		append(bytes.Clone(good), "kind: ConfigMap\n"...),
	} {
		if _, err := decode(bad); err == nil {
			t.Errorf("no error for\n%s", bad)
		}
	}
}
