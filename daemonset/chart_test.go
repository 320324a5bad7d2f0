package daemonset_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

func TestObjectsAreLabelled(t *testing.T) {
	eachVariant(t, func(t *testing.T, objects []object) {
		for _, o := range objects {
			labels := o.GetLabels()
			if labels["app.kubernetes.io/name"] != "raceway" || labels["app.kubernetes.io/part-of"] != "raceway" ||
				labels["app.kubernetes.io/managed-by"] == "" ||
				!slices.Contains([]string{"agent", "ca", "cni", "uninstall"}, labels["app.kubernetes.io/component"]) {
				t.Errorf("%s %s has the labels %v", o.GetKind(), o.GetName(), labels)
			}
		}
	})
}

// TestProgramsTakeTheirArguments has each program parse what its container would give it.
func TestProgramsTakeTheirArguments(t *testing.T) {
	bin := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "../cmd/raceway", "../cmd/raceway-agent", "../cmd/raceway-ca").CombinedOutput(); err != nil {
		t.Fatalf("build the programs: %v\n%s", err, out)
	}
	run := func(command string, args ...string) error {
		out, err := exec.CommandContext(t.Context(), filepath.Join(bin, filepath.Base(command)), args...).CombinedOutput()
		if err != nil {
			t.Logf("%s", out)
		}
		return err
	}
	if run("raceway-agent", "--no-such-flag", "--help") == nil {
		t.Fatal("the agent takes any flag")
	}
	eachVariant(t, func(t *testing.T, objects []object) {
		for name, pod := range pods(objects) {
			container := pod.Spec.Containers[0]
			var args []string
			for _, arg := range container.Args {
				for _, variable := range container.Env {
					arg = strings.ReplaceAll(arg, "$("+variable.Name+")", "some-"+strings.ToLower(strings.ReplaceAll(variable.Name, "_", "-")))
				}
				if strings.Contains(arg, "$(") {
					t.Errorf("%s: nothing sets the variable in %s", name, arg)
				}
				args = append(args, arg)
			}
			if err := run(container.Command[0], append(args, "--help")...); err != nil {
				t.Errorf("%s %v: %v", container.Command[0], args, err)
			}
		}
	})
}

func TestOnlyTheAgentHasCapabilities(t *testing.T) {
	eachVariant(t, func(t *testing.T, objects []object) {
		for name, pod := range pods(objects) {
			spec := pod.Spec
			if spec.HostNetwork || spec.HostIPC {
				t.Errorf("%s shares the host's network or IPC", name)
			}
			agent := name == "raceway-agent"
			if spec.HostPID != agent {
				t.Errorf("%s: hostPID is %v", name, spec.HostPID)
			}
			if nonRoot := spec.SecurityContext != nil && spec.SecurityContext.RunAsNonRoot != nil && *spec.SecurityContext.RunAsNonRoot; nonRoot == agent {
				t.Errorf("%s: runAsNonRoot is %v", name, nonRoot)
			}
			for i := range spec.Containers {
				checkContainer(t, name, &spec.Containers[i], agent)
			}
			for _, volume := range spec.Volumes {
				if volume.HostPath != nil && !agent {
					t.Errorf("%s has the host's %s", name, volume.HostPath.Path)
				}
			}
		}
	})
}

func checkContainer(t *testing.T, pod string, c *corev1.Container, agent bool) {
	t.Helper()
	s := c.SecurityContext
	if s == nil || s.Privileged == nil || *s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
		s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
		t.Errorf("%s: security context %+v", pod, s)
	}
	if !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("%s does not drop all capabilities", pod)
	}
	if len(s.Capabilities.Add) > 0 != agent {
		t.Errorf("%s has the capabilities %v", pod, s.Capabilities.Add)
	}
	for _, mount := range c.VolumeMounts {
		if mount.MountPropagation != nil && *mount.MountPropagation == corev1.MountPropagationBidirectional {
			t.Errorf("%s: %s propagates to the host, which needs a privileged container", pod, mount.MountPath)
		}
	}
}

func TestAgentsAreReplacedWithoutAGap(t *testing.T) {
	eachVariant(t, func(t *testing.T, objects []object) {
		set := find[*appsv1.DaemonSet](objects, "raceway-agent")
		update := set.Spec.UpdateStrategy.RollingUpdate
		if update == nil || update.MaxSurge.IntValue() != 1 || update.MaxUnavailable.IntValue() != 0 {
			t.Errorf("update strategy %+v", set.Spec.UpdateStrategy)
		}
		// A surge would fail where two pods want the same port of the host.
		for _, port := range set.Spec.Template.Spec.Containers[0].Ports {
			if port.HostPort != 0 {
				t.Errorf("port %d of the host", port.HostPort)
			}
		}
		spec := set.Spec.Template.Spec
		var drain time.Duration
		for _, arg := range spec.Containers[0].Args {
			if text, ok := strings.CutPrefix(arg, "--drain-timeout="); ok {
				var err error
				if drain, err = time.ParseDuration(text); err != nil {
					t.Error(err)
				}
			}
		}
		grace := time.Duration(*spec.TerminationGracePeriodSeconds) * time.Second
		if drain == 0 || grace <= drain {
			t.Errorf("an agent is killed after %v and drains for %v", grace, drain)
		}
		if !slices.ContainsFunc(spec.Tolerations, func(t corev1.Toleration) bool {
			return t.Key == "" && t.Operator == corev1.TolerationOpExists && t.Effect == ""
		}) {
			t.Errorf("tolerations %v", spec.Tolerations)
		}
	})
}

func TestExternalCATakesThePlaceOfOurs(t *testing.T) {
	objects := render(t, "chart", variants()["external CA"]...)
	for _, o := range objects {
		if o.GetLabels()["app.kubernetes.io/component"] == "ca" {
			t.Errorf("there is %s %s all the same", o.GetKind(), o.GetName())
		}
	}
	spec := find[*appsv1.DaemonSet](objects, "raceway-agent").Spec.Template.Spec
	for _, want := range []string{"--ca-address=istiod.istio-system.svc:15012", "--ca-name=istiod.istio-system.svc"} {
		if !slices.Contains(spec.Containers[0].Args, want) {
			t.Errorf("there is no %s", want)
		}
	}
	for _, volume := range spec.Volumes {
		switch volume.Name {
		case "ca-root":
			if volume.ConfigMap.Name != "istio-ca-root-cert" {
				t.Errorf("roots of %s", volume.ConfigMap.Name)
			}
		case "ca-token":
			if got := volume.Projected.Sources[0].ServiceAccountToken.Audience; got != "istio-ca" {
				t.Errorf("token for %s", got)
			}
		}
	}
}

// TestUninstallHookCanDoItsWork: Helm runs hooks before it deletes anything, but makes for
// them only what is a hook itself.
func TestUninstallHookCanDoItsWork(t *testing.T) {
	objects := render(t, "chart")
	job := find[*batchv1.Job](objects, "raceway-uninstall")
	if job == nil {
		t.Fatal("there is no hook")
	}
	found := 0
	for _, o := range objects {
		if o.GetLabels()["app.kubernetes.io/component"] != "uninstall" {
			continue
		}
		found++
		if o.GetAnnotations()["helm.sh/hook"] != "pre-delete" || !strings.Contains(o.GetAnnotations()["helm.sh/hook-delete-policy"], "before-hook-creation") {
			t.Errorf("%s %s has the annotations %v", o.GetKind(), o.GetName(), o.GetAnnotations())
		}
	}
	if found != 6 {
		t.Errorf("%d objects: a job, its account, two roles and their bindings", found)
	}
	if *job.Spec.ActiveDeadlineSeconds <= 300 {
		t.Errorf("the job is killed after %d s, before the command gives up", *job.Spec.ActiveDeadlineSeconds)
	}
}

func TestSchemaRefusesTypos(t *testing.T) {
	for _, set := range []string{
		"agents.logLevel=info", "agent.loglevel=info", "agent.logLevel=loud", "agent.drainTimeoutSeconds=10s", "agent.resources.request.cpu=1",
		"agent.extraArgs[0]=tc=clsact", "cni.confdir=/etc/cni", "cni.confDir=etc/cni", "ca.replicas=0", "ca.external.adress=x:1", "ca.external.address=x",
		"image.digest=abc", "enrollLabels=x", "admission.restrictagents=true", "monitoring.podMonitor.enable=true", "uninstall.timeoutSeconds=1",
		"agent.startupTaint=a b",
	} {
		if out, err := runHelm(t, "template", "chart", "--set", set); err == nil || !strings.Contains(out, "values don't meet the specifications") {
			t.Errorf("%s: %v\n%.200s", set, err, out)
		}
	}
}

// TestSchemaKnowsEveryValue also that which is an empty map by default.
func TestSchemaKnowsEveryValue(t *testing.T) {
	var schema, values map[string]any
	for path, into := range map[string]*map[string]any{"chart/values.schema.json": &schema, "chart/values.yaml": &values} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict(data, into); err != nil {
			t.Fatal(err)
		}
	}
	var walk func(path string, schema, values map[string]any)
	walk = func(path string, schema, values map[string]any) {
		properties, _ := schema["properties"].(map[string]any)
		if properties != nil && schema["additionalProperties"] != false {
			t.Errorf("the schema takes anything in %q", path)
		}
		for name := range properties {
			if _, ok := values[name]; !ok && path != "" && !strings.HasSuffix(path, ".resources") && !strings.HasSuffix(path, ".seLinuxOptions") {
				t.Errorf("the schema has %s.%s, values.yaml has not", path, name)
			}
		}
		for name, value := range values {
			property, ok := properties[name].(map[string]any)
			if !ok && properties != nil {
				t.Errorf("values.yaml has %s.%s, the schema has not", path, name)
			}
			if below, isMap := value.(map[string]any); isMap && ok {
				walk(strings.TrimPrefix(path+"."+name, "."), property, below)
			}
		}
	}
	walk("", schema, values)
}

func TestCRDsAreServedAndOutliveTheirRelease(t *testing.T) {
	objects := render(t, "crds")
	if len(objects) != 2 {
		t.Errorf("%d CRDs", len(objects))
	}
	for _, o := range objects {
		if o.GetKind() != "CustomResourceDefinition" || o.GetAnnotations()["helm.sh/resource-policy"] != "keep" {
			t.Errorf("%s %s, annotations %v", o.GetKind(), o.GetName(), o.GetAnnotations())
		}
		versions, _, err := unstructured.NestedSlice(o.Object, "spec", "versions")
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, v := range versions {
			version, _ := v.(map[string]any)
			_, hasStatus, _ := unstructured.NestedMap(version, "subresources", "status")
			_, hasColumns := version["additionalPrinterColumns"]
			if version["served"] != true || !hasStatus || !hasColumns {
				t.Errorf("%s %v: served %v, status %v, columns %v", o.GetName(), version["name"], version["served"], hasStatus, hasColumns)
			}
			name, _ := version["name"].(string)
			if version["storage"] == true {
				name += " stored"
			}
			got = append(got, name)
		}
		if !slices.Equal(got, []string{"v1 stored", "v1beta1"}) {
			t.Errorf("%s has the versions %q", o.GetName(), got)
		}
	}
}
