package report

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
)

// WriteTable writes the medians for people: a block for each workload, a line for each
// scenario.
func (r *Report) WriteTable(out io.Writer) error {
	m := r.Machine
	versions := m.Go
	if m.HAProxy != "" {
		versions += ", HAProxy " + m.HAProxy
	}
	if m.Envoy != "" {
		versions += ", Envoy " + m.Envoy
	}
	if _, err := fmt.Fprintf(out, "%s, %d cores, %d MiB; Linux %s; %s; commit %s; load %s\n%s\n%d rounds of %v; median, and ± half of what lies between the least and the greatest\n",
		m.CPU, m.Cores, m.MemoryMiB, m.Kernel, versions, m.Commit, m.Load, m.Command, r.Rounds, r.Duration); err != nil {
		return err
	}
	for _, workload := range r.Workloads {
		if err := r.writeWorkload(out, workload); err != nil {
			return err
		}
	}
	return nil
}

func (r *Report) writeWorkload(out io.Writer, workload Entry) error {
	metrics := r.metrics(workload.Name)
	if len(metrics) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0) // its Flush tells of errors
	header := []string{"\n" + workload.Title}
	for _, m := range metrics {
		header = append(header, m.Metric+", "+m.Unit)
	}
	fmt.Fprintln(w, strings.Join(header, "\t")) //nolint:errcheck // see above
	for _, s := range r.measured(workload.Name) {
		row := []string{"  " + s.Title}
		for _, m := range metrics {
			cell := "-"
			if x := r.Find(s.Name, workload.Name, m.Metric); x != nil {
				cell = x.cell()
			}
			row = append(row, cell)
		}
		fmt.Fprintln(w, strings.Join(row, "\t")) //nolint:errcheck // see above
	}
	return w.Flush()
}

// cell is the median, with the spread if there can be one.
func (x Result) cell() string {
	if len(x.Rounds) == 1 || x.Median == 0 {
		return short(x.Median)
	}
	return fmt.Sprintf("%s ±%.0f%%", short(x.Median), 50*(x.Max-x.Min)/x.Median)
}

// short shows three digits, and all of a large number's.
func short(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case v >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}
