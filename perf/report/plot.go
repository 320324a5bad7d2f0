package report

import (
	"fmt"
	"image/color"
	"os"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// panels are what is drawn, where it was measured.
func panels() [][2]string {
	return [][2]string{
		{"bulk-1", "CPU total"},
		{"bulk-1", "throughput"},
		{"bulk-8", "CPU total"},
		{"bulk-8", "throughput"},
		{"exchange-1", "p50"},
		{"exchange-1", "p99"},
		{"exchange-32", "rate"},
		{"exchange-32", "p99"},
		{"paced", "p50"},
		{"paced", "p99"},
		{"connect", "rate"},
		{"connect", "CPU total"},
		{IdleWorkload, "RSS client"},
		{IdleWorkload, "RSS server"},
		{"datagrams-512", "rate"},
		{"datagrams-512", "CPU total"},
		{"datagram-exchange", "p50"},
		{"datagram-exchange", "p99"},
		{FlowsWorkload, "RSS client"},
		{FlowsWorkload, "RSS server"},
	}
}

// WritePlots draws the medians with their spread, a panel for each metric that matters, as
// one SVG, and returns the file's path; "" when nothing was measured that is drawn.
func (r *Report) WritePlots(dir string) (string, error) {
	const columns = 2
	var drawn []*plot.Plot
	for _, panel := range panels() {
		if p, err := r.panel(panel[0], panel[1]); err != nil {
			return "", fmt.Errorf("draw %s of %s: %w", panel[1], panel[0], err)
		} else if p != nil {
			drawn = append(drawn, p)
		}
	}
	if len(drawn) == 0 {
		return "", nil
	}
	rows := (len(drawn) + columns - 1) / columns
	grid := make([][]*plot.Plot, rows)
	for i := range grid {
		grid[i] = make([]*plot.Plot, columns)
		copy(grid[i], drawn[i*columns:min(len(drawn), (i+1)*columns)])
	}
	const caption = 1.5 * vg.Centimeter
	canvas := vgsvg.New(columns*14*vg.Centimeter, vg.Length(rows)*7*vg.Centimeter+caption)
	all := draw.New(canvas)
	r.caption(draw.Crop(all, vg.Millimeter, 0, 0, 0))
	tiles := draw.Tiles{Rows: rows, Cols: columns, PadX: vg.Centimeter, PadY: vg.Centimeter, PadTop: caption, PadRight: vg.Centimeter}
	for i, line := range plot.Align(grid, tiles, all) {
		for j, c := range line {
			if grid[i][j] != nil {
				grid[i][j].Draw(c)
			}
		}
	}
	path := r.Base(dir) + ".svg"
	f, err := os.Create(path)
	if err != nil {
		return "", fmt.Errorf("write the plots: %w", err)
	}
	_, err = canvas.WriteTo(f)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return "", fmt.Errorf("write the plots: %w", err)
	}
	return path, nil
}

// caption says what the figures hold for.
func (r *Report) caption(c draw.Canvas) {
	m := r.Machine
	style := plot.New().X.Label.TextStyle
	style.YAlign = draw.YTop
	style.XAlign = draw.XLeft
	style.Font.Size = vg.Points(8)
	text := fmt.Sprintf("%s, %d cores; Linux %s; %s; HAProxy %s; Envoy %s; commit %s, %s\n%s; %d rounds of %v",
		m.CPU, m.Cores, m.Kernel, m.Go, orNone(m.HAProxy), orNone(m.Envoy), m.Commit, m.Date.Format("2006-01-02"), m.Command, r.Rounds, r.Duration)
	c.FillText(style, vg.Point{X: c.Min.X, Y: c.Max.Y - vg.Millimeter}, text)
}

func orNone(version string) string {
	if version == "" {
		return "none"
	}
	return version
}

// spread are the medians of a metric, and how far the rounds lie below and above.
type spread struct {
	plotter.XYs
	plotter.XErrors
}

// panel draws a metric as bars, the first scenario on top; nil when there is none.
func (r *Report) panel(workload, metric string) (*plot.Plot, error) {
	var (
		values plotter.Values
		labels []string
		bars   spread
		unit   string
		title  = workload
	)
	for i := len(r.Scenarios) - 1; i >= 0; i-- {
		x := r.Find(r.Scenarios[i].Name, workload, metric)
		if x == nil {
			continue
		}
		unit = x.Unit
		bars.XYs = append(bars.XYs, plotter.XY{X: x.Median, Y: float64(len(values))})
		bars.XErrors = append(bars.XErrors, struct{ Low, High float64 }{x.Median - x.Min, x.Max - x.Median})
		values = append(values, x.Median)
		labels = append(labels, x.Scenario)
	}
	if len(values) == 0 {
		return nil, nil
	}
	for _, w := range r.Workloads {
		if w.Name == workload {
			title = w.Title
		}
	}
	p := plot.New()
	p.Title.Text = title + ": " + metric
	p.X.Label.Text = unit
	p.X.Min = 0
	chart, err := plotter.NewBarChart(values, vg.Points(12))
	if err != nil {
		return nil, err
	}
	chart.Horizontal = true
	chart.Color = color.RGBA{R: 0x4c, G: 0x78, B: 0xa8, A: 0xff}
	chart.LineStyle.Width = 0
	errorBars, err := plotter.NewXErrorBars(bars)
	if err != nil {
		return nil, err
	}
	p.Add(chart, errorBars)
	p.NominalY(labels...)
	return p, nil
}
