//go:build !linux

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func newDemo(*cli) *cobra.Command {
	return &cobra.Command{
		Use:     "demo",
		Short:   demoShort,
		Long:    demoLong,
		Example: "  raceway demo",
		RunE:    func(*cobra.Command, []string) error { return errors.New("the demo needs Linux") },
	}
}
