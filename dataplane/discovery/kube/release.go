package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/raceway-mesh/raceway/dataplane"
)

const (
	// releasedKey of the mesh config says, when it is "true", that every pod is to be released.
	releasedKey = "released"
	// ReleasedAnnotation on an agent's own pod says, when it is "true", that its node is
	// free of the mesh.
	ReleasedAnnotation = "raceway.dev/released"
)

// Released returns a channel that is closed once the mesh config says that every pod is to
// be released. Snapshots say so too; neither takes it back.
func (s *Source) Released() <-chan struct{} { return s.released }

func (s *Source) releaseLocked(released bool) urgency {
	if !released || s.releases {
		return never
	}
	s.releases = true
	close(s.released)
	s.config.Log.Warn("the mesh is being taken off the cluster: every pod is released", "mesh config", s.config.MeshConfig.String())
	return urgent
}

// MarkReleased annotates the agent's own pod: its node is free of the mesh.
func (s *Source) MarkReleased(ctx context.Context) error {
	if s.config.Pod == (dataplane.Name{}) {
		return nil
	}
	if err := s.patchPod(ctx, s.config.Pod, "", map[string]any{ReleasedAnnotation: strconv.FormatBool(true)}); err != nil {
		return fmt.Errorf("annotate pod %s: %w", s.config.Pod, err)
	}
	return nil
}

// RemoveTaint removes the startup taint from the node, whatever its effect. It may be
// called again, and does nothing when there is none.
func (s *Source) RemoveTaint(ctx context.Context) error {
	if s.config.StartupTaint == "" {
		return nil
	}
	nodes := s.config.Client.Nodes()
	for {
		node, err := nodes.Get(ctx, s.config.Node, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("remove the taint %s: %w", s.config.StartupTaint, err)
		}
		left := slices.DeleteFunc(slices.Clone(node.Spec.Taints), func(t corev1.Taint) bool { return t.Key == s.config.StartupTaint })
		if len(left) == len(node.Spec.Taints) {
			return nil
		}
		// Whoever changed the taints in between is not overruled.
		patch, err := json.Marshal([]map[string]any{
			{"op": "test", "path": "/metadata/resourceVersion", "value": node.ResourceVersion},
			{"op": "replace", "path": "/spec/taints", "value": left},
		})
		if err != nil {
			return err
		}
		_, err = nodes.Patch(ctx, s.config.Node, types.JSONPatchType, patch, metav1.PatchOptions{})
		switch {
		case err == nil:
			s.config.Log.Info("the startup taint is removed: pods may come to this node", "taint", s.config.StartupTaint)
			return nil
		case apierrors.IsConflict(err), apierrors.IsInvalid(err): // a test of a patch that fails is invalid
			if !sleep(ctx, s.pace.retry) {
				return fmt.Errorf("remove the taint %s: %w", s.config.StartupTaint, err)
			}
		default:
			return fmt.Errorf("remove the taint %s: %w", s.config.StartupTaint, err)
		}
	}
}
