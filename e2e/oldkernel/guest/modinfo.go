package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"strings"
)

// dependencies reads what modinfo(8) shows as depends.
func dependencies(file string) (needs []string, err error) {
	object, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", file, err)
	}
	defer func() { err = errors.Join(err, object.Close()) }()
	section := object.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("module %s has no .modinfo", file)
	}
	data, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", file, err)
	}
	for field := range strings.SplitSeq(string(data), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			needs = append(needs, strings.Split(list, ",")...)
		}
	}
	return needs, nil
}
