package report

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// theme has the colours of GitHub's pages, which docs/images uses, too.
type theme struct {
	background, text, soft, grid string
	series                       []string
}

var (
	light = theme{"#ffffff", "#1f2328", "#59636e", "#d1d9e0", []string{"#0969da", "#bc4c00", "#6e7781", "#8250df", "#1a7f37"}}
	dark  = theme{"#0d1117", "#e6edf3", "#9198a1", "#2f353d", []string{"#4493f8", "#f0883e", "#8b949e", "#a371f7", "#3fb950"}}
)

const plotWidth = 860

// svg is a drawing under construction.
type svg struct {
	*strings.Builder
	theme
}

func newSVG(t theme, height float64, title, description string) *svg {
	s := &svg{&strings.Builder{}, t}
	fmt.Fprintf(s.Builder, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %.0f" width="%[1]d" height="%[2]g" role="img" aria-labelledby="title desc">
<title id="title">%s</title>
<desc id="desc">%s</desc>
<style>
  text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: %s; }
  .title { font-size: 16px; font-weight: 600; }
  .soft { fill: %s; font-size: 12px; }
</style>
<rect width="100%%" height="100%%" fill="%s"/>
`, plotWidth, height, html.EscapeString(title), html.EscapeString(description), t.text, t.soft, t.background)
	return s
}

func (s *svg) text(x, y float64, anchor, class, text string) {
	fmt.Fprintf(s.Builder, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" class=\"%s\">%s</text>\n", x, y, anchor, class, html.EscapeString(text))
}

func (s *svg) line(x1, y1, x2, y2 float64, colour string) {
	fmt.Fprintf(s.Builder, "<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"%s\"/>\n", x1, y1, x2, y2, colour)
}

func (s *svg) rect(x, y, width, height float64, colour string) {
	fmt.Fprintf(s.Builder, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n", x, y, width, height, colour)
}

func (s *svg) diamond(x, y float64, colour string) {
	fmt.Fprintf(s.Builder, "<path class=\"diamond\" d=\"M%.1f %.1fl6 6l-6 6l-6 -6z\" fill=\"%s\" stroke=\"%s\" stroke-width=\"2\"/>\n", x, y-6, s.background, colour)
}

// colour of server i of a plot.
func (s *svg) colour(i int) string { return s.series[i%len(s.series)] }

// legend writes the servers' names in one row.
func (s *svg) legend(x, y float64, servers []string) {
	for i, server := range servers {
		s.rect(x, y-10, 12, 12, s.colour(i))
		s.text(x+18, y, "start", "", server)
		x += 40 + 7.2*float64(len(server))
	}
}

func (s *svg) end() string {
	s.WriteString("</svg>\n")
	return s.String()
}

// throughput draws the highest rates: a group of bars for each load. It returns "" if
// there are none.
func (r *Report) throughput(servers []string, t theme) string {
	loads := r.loads(false)
	if len(loads) == 0 {
		return ""
	}
	const (
		left, right, top  = 285.0, 70.0, 78.0
		bar, gap, between = 15.0, 3.0, 20.0
	)
	group := float64(len(servers))*(bar+gap) + between
	height := top + float64(len(loads))*group + 60
	highest := 0.0
	for _, load := range loads {
		for _, server := range servers {
			if m := r.Median(load, server); m > highest {
				highest = m
			}
		}
	}
	step := tick(highest, 6)
	scale := (plotWidth - left - right) / highest
	s := newSVG(t, height, "Cached tokens a second, on one core", "Bars of requests per second of each server under each load, as in the table of highest rates.")
	s.text(20, 30, "start", "title", "Cached tokens a second, server on one core")
	s.legend(20, 56, servers)
	bottom := height - 54
	for v := 0.0; v <= highest; v += step {
		s.line(left+v*scale, top-4, left+v*scale, bottom, t.grid)
		s.text(left+v*scale, bottom+18, "middle", "soft", thousands(v))
	}
	s.text(left+(plotWidth-left-right)/2, bottom+40, "middle", "soft", "requests a second; bars: median, lines: lowest to highest round")
	for i, load := range loads {
		y := top + float64(i)*group + between/2
		s.text(left-12, y+float64(len(servers))*(bar+gap)/2+4, "end", "", load)
		for j, server := range servers {
			o := r.over(load, server, perSecond)
			if !math.IsNaN(o.median) {
				s.rect(left, y, o.median*scale, bar, s.colour(j))
				high := min(o.high, highest*1.02) // the scale ends with the highest median
				s.line(left+o.low*scale, y+bar/2, left+high*scale, y+bar/2, t.text)
				s.text(left+high*scale+6, y+bar-3, "start", "soft", thousands(o.median))
			}
			y += bar + gap
		}
	}
	return s.end()
}

// latency draws the 50th and 99th percentile by rate: lines through the rates that all servers were
// asked for, and diamonds where each server was asked for another rate. It returns "" without any open loop.
func (r *Report) latency(servers []string, t theme) string {
	type point struct{ rate, p50, p99 float64 }
	lines, diamonds := make([][]point, len(servers)), make([][]point, len(servers))
	low, high, fastest := math.Inf(1), 0.0, 0.0
	var ownLoad string
	for i, server := range servers {
		for _, load := range r.loads(true) {
			samples := r.rounds(load, server)
			if saturated, invalid := doubtful(samples); 2*(saturated+invalid) >= len(samples) {
				continue // also without any
			}
			p := point{samples[0].Rate, r.over(load, server, p50).median, r.over(load, server, p99).median}
			if r.sameRate(load) {
				lines[i] = append(lines[i], p)
			} else {
				diamonds[i], ownLoad = append(diamonds[i], p), load
			}
			low, high, fastest = min(low, p.p50), max(high, p.p99), max(fastest, p.rate)
		}
		slices.SortFunc(lines[i], func(a, b point) int { return int(a.rate - b.rate) })
	}
	if fastest == 0 {
		return ""
	}
	const left, right, top, height = 90.0, 40.0, 100.0, 462.0
	bottom := height - 56
	ticks := ladder(low, high)
	lowest, highest := math.Log10(ticks[0]), math.Log10(ticks[len(ticks)-1])
	x := func(rate float64) float64 { return left + rate/(fastest*1.02)*(plotWidth-left-right) }
	y := func(us float64) float64 {
		return bottom - (math.Log10(us)-lowest)/(highest-lowest)*(bottom-top)
	}
	s := newSVG(t, height, "Latency of cached tokens by rate", "Lines of the 50th and 99th percentile of each server at fixed rates, and diamonds at rates of its own, as in the table of latencies.")
	s.text(20, 30, "start", "title", "Latency of cached tokens at fixed rates, server on one core (log scale)")
	s.legend(20, 56, servers)
	fmt.Fprintf(s.Builder, "<path d=\"M20 74h26\" stroke=\"%s\" stroke-width=\"2\"/>", t.text)
	s.text(52, 78, "start", "", "p99")
	fmt.Fprintf(s.Builder, "<path d=\"M96 74h26\" stroke=\"%s\" stroke-width=\"2\" stroke-dasharray=\"3 4\"/>", t.text)
	s.text(128, 78, "start", "", "p50")
	if ownLoad != "" {
		s.diamond(178, 74, t.text)
		s.text(190, 78, "start", "", "at "+ownLoad)
	}
	for _, v := range ticks {
		s.line(left, y(v), plotWidth-right, y(v), t.grid)
		s.text(left-8, y(v)+4, "end", "soft", tickText(v))
	}
	for v, step := 0.0, tick(fastest, 7); v <= fastest; v += step {
		s.text(x(v), bottom+18, "middle", "soft", thousands(v))
	}
	s.text(left+(plotWidth-left-right)/2, bottom+40, "middle", "soft", "requests a second")
	for i, points := range lines {
		for _, p := range diamonds[i] {
			s.diamond(x(p.rate), y(p.p50), s.colour(i))
			s.diamond(x(p.rate), y(p.p99), s.colour(i))
		}
		if len(points) == 0 {
			continue
		}
		var p50s, p99s strings.Builder
		for j, p := range points {
			verb := "L"
			if j == 0 {
				verb = "M"
			}
			fmt.Fprintf(&p50s, "%s%.1f %.1f", verb, x(p.rate), y(p.p50))
			fmt.Fprintf(&p99s, "%s%.1f %.1f", verb, x(p.rate), y(p.p99))
			fmt.Fprintf(s.Builder, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", x(p.rate), y(p.p99), s.colour(i))
		}
		fmt.Fprintf(s.Builder, "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\" stroke-dasharray=\"3 4\"/>\n", p50s.String(), s.colour(i))
		fmt.Fprintf(s.Builder, "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", p99s.String(), s.colour(i))
	}
	return s.end()
}

// tick is 1, 2 or 5 times a power of ten, of which at most n fit into highest.
func tick(highest float64, n int) float64 {
	step := math.Pow(10, math.Floor(math.Log10(highest/float64(n))))
	for _, m := range []float64{1, 2, 5} {
		if highest/(m*step) <= float64(n) {
			return m * step
		}
	}
	return 10 * step
}

// ladder is what an axis from low to high shows in a log scale: 1, 2 and 5 times powers of
// ten, the first at most low and the last at least high.
func ladder(low, high float64) []float64 {
	var steps []float64
	for decade := math.Pow(10, math.Floor(math.Log10(low))); ; decade *= 10 {
		for _, m := range []float64{1, 2, 5} {
			v := m * decade
			if v <= low {
				steps = nil
			}
			steps = append(steps, v)
			if v >= high && v > low {
				return steps
			}
		}
	}
}

// tickText formats microseconds on an axis.
func tickText(us float64) string {
	if us < 1000 {
		return fmt.Sprintf("%g µs", us)
	}
	return fmt.Sprintf("%g ms", us/1000)
}

func thousands(v float64) string {
	text := fmt.Sprintf("%.0f", v)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
