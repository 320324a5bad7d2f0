//go:build !linux

package main

import (
	"context"
	"errors"
)

func (r *nodeRelease) run(context.Context) ([]string, error) {
	return nil, errors.New("a node of Raceway runs Linux")
}
