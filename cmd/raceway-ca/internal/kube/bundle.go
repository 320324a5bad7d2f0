package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/raceway-mesh/raceway/certs/ca"
)

// Roots is what is published.
type Roots interface {
	// Bundle returns PEM, and a channel that is closed when it may have changed.
	Bundle() (pem []byte, changed <-chan struct{})
}

const (
	// bundleSettle is how long a difference must last before it is put right: when the roots
	// change, one replica knows a moment before the other, which must not put the old ones
	// back.
	bundleSettle = time.Second
	bundleRetry  = 30 * time.Second // at most, after an error
)

// Publish keeps the roots in the ConfigMap, and puts them back when somebody changes it, until
// ctx ends. Several replicas may do so at a time.
func (c *Cluster) Publish(ctx context.Context, roots Roots) error {
	name := c.cfg.Bundle
	factory := informers.NewSharedInformerFactoryWithOptions(c.cfg.Client, 0, informers.WithNamespace(name.Namespace), informers.WithTweakListOptions(only(name)))
	informer := factory.Core().V1().ConfigMaps().Informer()
	seen := make(chan struct{}, 1)
	see := func() {
		select {
		case seen <- struct{}{}:
		default: // a look is due already
		}
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { see() },
		UpdateFunc: func(any, any) { see() },
		DeleteFunc: func(any) { see() },
	})
	if err := errors.Join(err, informer.SetWatchErrorHandlerWithContext(logWatch(c.cfg.Log, "configmap "+name.String()))); err != nil {
		return fmt.Errorf("watch configmap %s: %w", name, err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		informer.RunWithContext(ctx)
		return nil
	})
	group.Go(func() error {
		c.publish(ctx, roots, seen)
		return nil
	})
	return group.Wait()
}

// publish looks at once, and then whenever the ConfigMap or the roots have changed.
func (c *Cluster) publish(ctx context.Context, roots Roots, seen <-chan struct{}) {
	retry := bundleSettle
	lastErr := ""
	for {
		pem, changed := roots.Bundle()
		var again <-chan time.Time
		err := c.putBundle(ctx, pem)
		if ctx.Err() != nil {
			return
		}
		c.cfg.OnBundle(err)
		if err == nil {
			retry, lastErr = bundleSettle, ""
		} else {
			if text := err.Error(); text != lastErr {
				c.cfg.Log.Error("roots not published: agents do not learn of them, and new agents do not start", "configmap", c.cfg.Bundle.String(), "error", err)
				lastErr = text
			}
			again = time.After(retry)
			retry = min(2*retry, bundleRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
			continue
		case <-changed:
			continue // our own news, which needs no patience
		case <-seen:
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-time.After(bundleSettle):
		}
	}
}

// putBundle writes only where there is a difference.
func (c *Cluster) putBundle(ctx context.Context, pem []byte) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	maps := c.cfg.Client.CoreV1().ConfigMaps(c.cfg.Bundle.Namespace)
	found, err := maps.Get(ctx, c.cfg.Bundle.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		fresh := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: c.cfg.Bundle.Name, Namespace: c.cfg.Bundle.Namespace, Labels: labels()},
			Data:       map[string]string{ca.RootFile: string(pem)},
		}
		_, err = maps.Create(ctx, fresh, metav1.CreateOptions{FieldManager: fieldManager})
		if !apierrors.IsAlreadyExists(err) {
			return err
		}
		found, err = maps.Get(ctx, c.cfg.Bundle.Name, metav1.GetOptions{})
	}
	if err != nil {
		return err
	}
	if found.Data[ca.RootFile] == string(pem) {
		return nil
	}
	// A merge patch of one key leaves the others to whoever made them. A key may be in data or
	// in binaryData, not in both.
	patch, err := json.Marshal(map[string]any{
		"data":       map[string]any{ca.RootFile: string(pem)},
		"binaryData": map[string]any{ca.RootFile: nil},
	})
	if err != nil {
		return err
	}
	if _, err := maps.Patch(ctx, c.cfg.Bundle.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager}); err != nil {
		return err
	}
	c.cfg.Log.Info("roots published", "configmap", c.cfg.Bundle.String())
	return nil
}
