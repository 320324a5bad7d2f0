package report

import (
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/perf/benchmath"
)

// Change is how one metric differs between two reports.
type Change struct {
	Scenario, Workload, Metric, Unit string
	Before, After                    float64 // medians
	P                                float64 // of the Mann–Whitney U test: how likely mere chance is
	Worse                            bool    // towards more cost or less speed
	Significant                      bool    // no chance, and large enough to matter
}

// Ratio is after to before.
func (c Change) Ratio() float64 { return c.After / c.Before }

// Thresholds say what counts as a change.
type Thresholds struct {
	Alpha float64 // a change is one when chance is less likely than this; default 0.05
	Ratio float64 // and the medians differ by more than this part; default 0.05
}

func (t Thresholds) withDefaults() Thresholds {
	if t.Alpha == 0 {
		t.Alpha = 0.05
	}
	if t.Ratio == 0 {
		t.Ratio = 0.05
	}
	return t
}

// Comparison is what Compare found.
type Comparison struct {
	Changes  []Change
	Warnings []string // what makes the answer worth less
}

// Compare compares each result that both reports have. The rounds of a scenario are its
// sample, of which nothing is assumed.
func Compare(before, after *Report, t Thresholds) Comparison {
	t = t.withDefaults()
	var c Comparison
	if a, b := before.Machine, after.Machine; a.CPU != b.CPU || a.Cores != b.Cores || a.Kernel != b.Kernel {
		c.Warnings = append(c.Warnings, "the reports are of different machines: only ratios within each of them mean something")
	}
	thresholds := benchmath.DefaultThresholds
	thresholds.CompareAlpha = t.Alpha
	var warnings []string
	for _, x := range before.Results {
		y := after.Find(x.Scenario, x.Workload, x.Metric)
		if y == nil || x.Median == 0 {
			continue
		}
		if !canTell(len(x.Rounds), len(y.Rounds), t.Alpha) {
			warnings = append(warnings, fmt.Sprintf("%d and %d rounds are too few to tell a change from chance", len(x.Rounds), len(y.Rounds)))
		}
		test := benchmath.AssumeNothing.Compare(benchmath.NewSample(slices.Clone(x.Rounds), &thresholds), benchmath.NewSample(slices.Clone(y.Rounds), &thresholds))
		for _, w := range test.Warnings {
			warnings = append(warnings, w.Error())
		}
		change := Change{
			Scenario: x.Scenario, Workload: x.Workload, Metric: x.Metric, Unit: x.Unit,
			Before: x.Median, After: y.Median, P: test.P,
		}
		change.Worse = (change.Ratio() > 1) != moreIsBetter(x.Metric)
		change.Significant = test.P < t.Alpha && max(change.Ratio()-1, 1-change.Ratio()) > t.Ratio
		c.Changes = append(c.Changes, change)
	}
	slices.Sort(warnings)
	c.Warnings = append(c.Warnings, slices.Compact(warnings)...)
	return c
}

// canTell reports whether samples of these sizes can be told apart at all: the least that the
// test can answer is the chance that all of one lie beyond all of the other, on either side.
func canTell(n, m int, alpha float64) bool {
	arrangements, _ := new(big.Float).SetInt(new(big.Int).Binomial(int64(n+m), int64(n))).Float64()
	return 2/arrangements < alpha
}

// moreIsBetter tells speeds from costs. What is paced has the same rate always.
func moreIsBetter(metric string) bool {
	return metric == "throughput" || strings.HasSuffix(metric, "rate")
}

// Regressions are the changes to the worse.
func (c Comparison) Regressions() []Change {
	return slices.DeleteFunc(slices.Clone(c.Changes), func(x Change) bool { return !x.Significant || !x.Worse })
}

// WriteTable writes the changes that are significant, or all, and the warnings.
func (c Comparison) WriteTable(out io.Writer, all bool) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)                                 // its Flush tells of errors
	fmt.Fprintln(w, "SCENARIO\tWORKLOAD\tMETRIC\tBEFORE\tAFTER\tRATIO\tP\tCHANGE") //nolint:errcheck // see above
	for _, x := range c.Changes {
		if !x.Significant && !all {
			continue
		}
		verdict := "none"
		switch {
		case x.Significant && x.Worse:
			verdict = "worse"
		case x.Significant:
			verdict = "better"
		}
		fmt.Fprintf(w, "%s\t%s\t%s, %s\t%s\t%s\t%.2f\t%.3f\t%s\n", //nolint:errcheck // see above
			x.Scenario, x.Workload, x.Metric, x.Unit, short(x.Before), short(x.After), x.Ratio(), x.P, verdict)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, warning := range c.Warnings {
		if _, err := fmt.Fprintln(out, "note: "+warning); err != nil {
			return err
		}
	}
	return nil
}
