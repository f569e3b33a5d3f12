// Package report turns what was measured into JSON, Markdown and plots.
//
// The JSON has every round; tables and plots show medians of the rounds. Ratios are
// taken between two servers in the same round, so that what a machine does to both
// cancels out, and then their median.
package report

import (
	"math"
	"slices"
)

// Report is one run of the suite.
type Report struct {
	Date       string // YYYY-MM-DD
	Command    string
	Commit     string
	Machine    Machine
	Rounds     int
	Seconds    int      // of one measurement
	TokenBytes int      // of a response's body
	Servers    []string // in the order of the tables
	Samples    []Sample
	Goals      []Goal   `json:"-"`
	Clients    []Client `json:",omitempty"`
	// NotMeasured are loads under which a server failed, each with the server's name.
	NotMeasured []string `json:",omitempty"`
}

// Machine is what the numbers depend on.
type Machine struct {
	CPU                    string
	Cores                  int
	Kernel, Go, Nginx, Wrk string // versions
}

// Sample is one server under one load in one round. Times are in microseconds.
type Sample struct {
	Load   string
	Server string
	Round  int // from 1
	// Rate that was asked for, in requests a second, in an open loop; 0 in a closed one.
	Rate           float64 `json:",omitempty"`
	PerSecond      float64 // responses
	CPU            float64 // of the server, for a request
	Other          float64 // programs' share of the machine meanwhile, in percent of a core
	P50, P99, P999 float64
	Max            float64 `json:",omitempty"` // with Rate, as all below
	LagP99         float64 `json:",omitempty"` // the generator's own
	Saturated      bool    `json:",omitempty"` // the server could not keep up
	Invalid        bool    `json:",omitempty"` // the generator could not keep up
	// FastPath has the growth of the agent's counters of its fast path.
	FastPath map[string]float64 `json:",omitempty"`
}

// Client is an SDK that got tokens from the agent.
type Client struct {
	Name     string
	Requests int
	FastPath map[string]float64 // as in Sample
}

// Goal is what a ratio of the two servers under a load should be: Least for requests a
// second, or Most for the 99th percentile.
type Goal struct {
	Load, Server, Than string
	Least, Most        float64
}

func perSecond(s Sample) float64 { return s.PerSecond }
func cpu(s Sample) float64       { return s.CPU }
func p50(s Sample) float64       { return s.P50 }
func p99(s Sample) float64       { return s.P99 }
func p999(s Sample) float64      { return s.P999 }

// busy is how much of a core the server used, in percent.
func busy(s Sample) float64 { return s.CPU * s.PerSecond / 1e4 }

func other(s Sample) float64 { return s.Other }

// spread is what several rounds gave.
type spread struct{ median, low, high float64 }

// spreadOf returns NaNs for no values.
func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{math.NaN(), math.NaN(), math.NaN()}
	}
	values = slices.Sorted(slices.Values(values))
	n := len(values)
	return spread{(values[(n-1)/2] + values[n/2]) / 2, values[0], values[n-1]}
}

// Median returns the median of the rounds' responses a second; NaN if there is none.
func (r *Report) Median(load, server string) float64 {
	return r.over(load, server, perSecond).median
}

func (r *Report) over(load, server string, value func(Sample) float64) spread {
	return spreadOf(values(r.rounds(load, server), value))
}

// rounds are the samples of a server under a load.
func (r *Report) rounds(load, server string) []Sample {
	var all []Sample
	for _, s := range r.Samples {
		if s.Load == load && s.Server == server {
			all = append(all, s)
		}
	}
	return all
}

func values(samples []Sample, value func(Sample) float64) []float64 {
	all := make([]float64, 0, len(samples))
	for _, s := range samples {
		all = append(all, value(s))
	}
	return all
}

// ratio compares two servers round by round.
func (r *Report) ratio(load, server, than string, value func(Sample) float64) spread {
	var ratios []float64
	for _, a := range r.rounds(load, server) {
		for _, b := range r.rounds(load, than) {
			if a.Round == b.Round {
				ratios = append(ratios, value(a)/value(b))
			}
		}
	}
	return spreadOf(ratios)
}

// sameRate reports whether all servers were asked for the same rate in an open loop.
func (r *Report) sameRate(load string) bool {
	var rates []float64
	for _, s := range r.Samples {
		if s.Load == load && !slices.Contains(rates, s.Rate) {
			rates = append(rates, s.Rate)
		}
	}
	return len(rates) == 1
}

// loads are the names of closed or open loops, in the order in which they were run.
func (r *Report) loads(open bool) []string {
	var names []string
	for _, s := range r.Samples {
		if (s.Rate > 0) == open && !slices.Contains(names, s.Load) {
			names = append(names, s.Load)
		}
	}
	return names
}
