package main

import (
	"context"
	"fmt"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
)

const metricsURL = "http://" + testbed.NodeAddress + ":9090/metrics"

// sample is the agent that serves, at one moment.
type sample struct {
	at          time.Duration // since the start
	pid         int
	resident    float64 // MiB
	goroutines  float64
	descriptors float64
	answers     int64
}

// sampled are the columns of samples that are to be flat.
var sampled = []struct {
	name, unit string
	value      func(sample) float64
}{
	{"resident memory", "MiB", func(s sample) float64 { return s.resident }},
	{"goroutines", "", func(s sample) float64 { return s.goroutines }},
	{"descriptors", "", func(s sample) float64 { return s.descriptors }},
}

// takeSamples samples until ctx ends.
func (s *soak) takeSamples(ctx context.Context, every time.Duration) error {
	began := time.Now()
	for pause(ctx, every) {
		agent := s.agent.Load()
		m, err := measure.Scrape(ctx, metricsURL)
		if err != nil {
			continue // another agent is taking over
		}
		memory, err := measure.MemoryOf(agent.PID())
		if err != nil {
			continue // likewise
		}
		descriptors, err := measure.Descriptors(agent.PID())
		if err != nil {
			continue
		}
		var answers int64
		for i := range s.tally.counts {
			answers += s.tally.counts[i].Load()
		}
		s.samples = append(s.samples, sample{
			at: time.Since(began), pid: agent.PID(), resident: float64(memory.Resident) / (1 << 20),
			goroutines: m["go_goroutines"], descriptors: float64(descriptors), answers: answers,
		})
	}
	return nil
}

// column is one value of each sample.
func column(samples []sample, value func(sample) float64) (values []float64) {
	for _, s := range samples {
		values = append(values, value(s))
	}
	return values
}

// shortest is the shortest life of an agent that has a slope.
const shortest = 2 * time.Minute

// trend is how a column changes: the medians of the first and of the last third, and the
// growth an hour within the life of one agent, the median of all agents. Upgrades would hide
// what grows with an agent's age from the first two.
func trend(samples []sample, value func(sample) float64) (first, last, perHour float64) {
	values := column(samples, value)
	third := (len(values) + 2) / 3
	first, last = measure.Median(values[:third]), measure.Median(values[len(values)-third:])
	var slopes []float64
	for len(samples) > 0 {
		n := 1
		for n < len(samples) && samples[n].pid == samples[0].pid {
			n++
		}
		life := samples[:n]
		samples = samples[n:]
		life = life[n/4:] // it warms up
		if life[len(life)-1].at-life[0].at < shortest {
			continue
		}
		hours := column(life, func(s sample) float64 { return s.at.Hours() })
		slopes = append(slopes, measure.Slope(hours, column(life, value)))
	}
	return first, last, measure.Median(slopes)
}

// printSamples prints at most 20 of them.
func printSamples(samples []sample) {
	fmt.Println("\n| after | resident, MiB | goroutines | descriptors | answers |")
	fmt.Println("|---:|---:|---:|---:|---:|")
	for i := 0; i < len(samples); i += 1 + len(samples)/20 {
		s := samples[i]
		fmt.Printf("| %s | %.1f | %.0f | %.0f | %d |\n", s.at.Round(time.Second), s.resident, s.goroutines, s.descriptors, s.answers)
	}
}
