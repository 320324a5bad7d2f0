//go:build race

package e2e

// raceEnabled builds the programs under test as this test was built.
const raceEnabled = true
