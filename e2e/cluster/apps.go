package cluster

import (
	"context"
	"path/filepath"

	"github.com/raceway-mesh/raceway/e2e/cluster/image"
)

// AppRef is the image of the tests' own application (command app).
const AppRef = "images.test/app:1"

// LoadApp builds the tests' application and gives it to the nodes as AppRef.
func (c *Cluster) LoadApp(ctx context.Context) error {
	if err := Build(ctx, c.bin(""), "./app"); err != nil {
		return err
	}
	tar := filepath.Join(stateDir, "images", "app.tar")
	err := image.Write(tar, image.Spec{
		Ref: AppRef, Files: map[string]string{"/bin/app": c.bin("app")}, Entrypoint: []string{"/bin/app"}, User: "65532:65532",
	})
	if err != nil {
		return err
	}
	return c.LoadImage(ctx, tar)
}
