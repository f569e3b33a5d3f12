package report

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// Plot is a drawing in two SVG files.
type Plot struct{ Light, Dark, Alt string }

// Markdown is the report as people read it.
func (r *Report) Markdown(plots ...Plot) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Cached tokens through the redirect, %s\n\n", r.Date)
	fmt.Fprintf(&b, "Command: `%s`, at %s. Machine: %s, %d cores, Linux %s, %s, nginx %s, wrk %s.\n\n",
		r.Command, r.Commit, r.Machine.CPU, r.Machine.Cores, r.Machine.Kernel, r.Machine.Go, r.Machine.Nginx, r.Machine.Wrk)
	fmt.Fprintf(&b, "Tokens of %d bytes, server and load on a core each, %d s a measurement, %s.\n", r.TokenBytes, r.Seconds, rounds(r.Rounds))
	if len(r.Samples) > 0 {
		o := spreadOf(values(r.Samples, other))
		fmt.Fprintf(&b, "Meanwhile other programs used %.0f %% of a core (median of all measurements; %.0f %% at the highest).\n", o.median, o.high)
	}
	b.WriteString("What is compared, and how: [docs/performance.md](../../docs/performance.md).\n")
	for _, p := range plots {
		fmt.Fprintf(&b, "\n<picture>\n  <source media=\"(prefers-color-scheme: dark)\" srcset=\"%s\">\n  <img alt=\"%s\" src=\"%s\">\n</picture>\n", p.Dark, p.Alt, p.Light)
	}
	r.goals(&b)
	r.closed(&b)
	r.open(&b)
	r.clients(&b)
	if len(r.NotMeasured) > 0 {
		slices.Sort(r.NotMeasured)
		fmt.Fprintf(&b, "\nFailed, and so not in every round: %s.\n", strings.Join(slices.Compact(r.NotMeasured), "; "))
	}
	return b.String()
}

func rounds(n int) string {
	if n == 1 {
		return "one round"
	}
	return fmt.Sprintf("medians of %d interleaved rounds (lowest to highest)", n)
}

func (r *Report) goals(b *strings.Builder) {
	var rows []string
	for _, g := range r.Goals {
		what, goal, got := "requests/s", fmt.Sprintf("≥ %.2f", g.Least), r.ratio(g.Load, g.Server, g.Than, perSecond)
		met := got.median >= g.Least
		if g.Most > 0 {
			what, goal, got = "p99", fmt.Sprintf("≤ %.2f", g.Most), r.ratio(g.Load, g.Server, g.Than, p99)
			met = got.median <= g.Most
		}
		if math.IsNaN(got.median) {
			continue
		}
		verdict := "met"
		if !met {
			verdict = "MISSED"
		}
		rows = append(rows, fmt.Sprintf("| %s: %s of %s to %s | %s | %s | %s |\n", g.Load, what, g.Server, g.Than, ratioText(got), goal, verdict))
	}
	if rows != nil {
		b.WriteString("\n## Goals\n\n| ratio | measured | goal | |\n|---|---:|---:|---|\n" + strings.Join(rows, ""))
	}
}

func (r *Report) closed(b *strings.Builder) {
	loads := r.loads(false)
	if len(loads) == 0 {
		return
	}
	b.WriteString("\n## Highest rates\n\nA closed loop (wrk): each connection sends its next request when it has read the last response.\n" +
		"CPU is the server's for a request, and core how much of its core that makes: far below 100, the load was the limit, or other programs were.\n")
	base := r.bases(loads[0])
	fmt.Fprintf(b, "\n| load | server | requests/s |%s CPU, µs | core, %% | p50 | p99 | p99.9 |\n|---|---|---:|%s---:|---:|---:|---:|---:|\n",
		prefixed(base, " to %s |"), strings.Repeat("---:|", len(base)))
	for _, load := range loads {
		for _, server := range r.Servers {
			if len(r.rounds(load, server)) == 0 {
				continue
			}
			fmt.Fprintf(b, "| %s | %s | %s |", load, server, rateText(r.over(load, server, perSecond)))
			for _, than := range base {
				fmt.Fprintf(b, " %.2f |", r.ratio(load, server, than, perSecond).median)
			}
			fmt.Fprintf(b, " %.1f | %.0f | %s | %s | %s |\n", r.over(load, server, cpu).median, r.over(load, server, busy).median,
				timeText(r.over(load, server, p50).median), timeText(r.over(load, server, p99).median), timeText(r.over(load, server, p999).median))
		}
	}
}

// bases are the servers that goals compare with.
func (r *Report) bases(load string) []string {
	var names []string
	for _, g := range r.Goals {
		if !slices.Contains(names, g.Than) && len(r.rounds(load, g.Than)) > 0 {
			names = append(names, g.Than)
		}
	}
	return names
}

func prefixed(names []string, format string) string {
	var b strings.Builder
	for _, name := range names {
		fmt.Fprintf(&b, format, name)
	}
	return b.String()
}

func (r *Report) open(b *strings.Builder) {
	loads := r.loads(true)
	if len(loads) == 0 {
		return
	}
	b.WriteString("\n## Latency at fixed rates\n\nAn open loop: requests are due at fixed times, and latency counts from then. Lag is the generator's own (p99).\n")
	b.WriteString("\n| rate | server | requests/s | CPU, µs | p50 | p99 | p99.9 | highest | lag | |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---|\n")
	for _, load := range loads {
		for _, server := range r.Servers {
			samples := r.rounds(load, server)
			if len(samples) == 0 {
				continue
			}
			at := func(value func(Sample) float64) string {
				return timeText(spreadOf(values(samples, value)).median)
			}
			fmt.Fprintf(b, "| %s | %s | %.0f | %.1f | %s | %s | %s | %s | %s | %s |\n", load, server,
				r.over(load, server, func(s Sample) float64 { return s.Rate }).median, r.over(load, server, cpu).median,
				at(p50), at(p99), at(p999), at(func(s Sample) float64 { return s.Max }), at(func(s Sample) float64 { return s.LagP99 }), remark(samples))
		}
	}
}

// doubtful counts the rounds in which the numbers are not latencies of the server.
func doubtful(samples []Sample) (saturated, invalid int) {
	for _, s := range samples {
		if s.Saturated {
			saturated++
		} else if s.Invalid {
			invalid++
		}
	}
	return saturated, invalid
}

func remark(samples []Sample) string {
	saturated, invalid := doubtful(samples)
	var remarks []string
	if saturated > 0 {
		remarks = append(remarks, fmt.Sprintf("saturated in %d of %d", saturated, len(samples)))
	}
	if invalid > 0 {
		remarks = append(remarks, fmt.Sprintf("INVALID in %d of %d: the generator was late", invalid, len(samples)))
	}
	return strings.Join(remarks, "; ")
}

func (r *Report) clients(b *strings.Builder) {
	if len(r.Clients) == 0 {
		return
	}
	b.WriteString("\n## Azure's SDKs\n\nEach in new processes, as pods start them; tokens from the agent's memory. Counters of its fast path:\n")
	b.WriteString("\n| client | requests | counters |\n|---|---:|---|\n")
	for _, c := range r.Clients {
		var counters []string
		for _, name := range slices.Sorted(maps.Keys(c.FastPath)) {
			counters = append(counters, fmt.Sprintf("`%s` %.0f", name, c.FastPath[name]))
		}
		if counters == nil {
			counters = []string{"-"}
		}
		fmt.Fprintf(b, "| %s | %d | %s |\n", c.Name, c.Requests, strings.Join(counters, ", "))
	}
}

func rateText(s spread) string {
	if s.low == s.high {
		return fmt.Sprintf("%.0f", s.median)
	}
	return fmt.Sprintf("%.0f (%.0f to %.0f)", s.median, s.low, s.high)
}

func ratioText(s spread) string {
	if s.low == s.high {
		return fmt.Sprintf("%.2f", s.median)
	}
	return fmt.Sprintf("%.2f (%.2f to %.2f)", s.median, s.low, s.high)
}

// timeText formats microseconds.
func timeText(us float64) string {
	switch {
	case us < 1000:
		return fmt.Sprintf("%.0f µs", us)
	case us < 10_000:
		return fmt.Sprintf("%.2f ms", us/1000)
	case us < 1_000_000:
		return fmt.Sprintf("%.0f ms", us/1000)
	default:
		return fmt.Sprintf("%.1f s", us/1_000_000)
	}
}
