package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
)

// rate is below what the agent lets pods share (proxy/listener), so that no request is held
// back; the agent's CPU time for a request is compared at this rate, because the machine's
// other work changes it less than requests/s.
const rate = 5000

// step is one size of something that grows.
type step struct {
	name  string
	world *testbed.World // the agent is started anew for each measurement
	load  load
	prime func() error // before the load; may be nil
	goal  float64      // most CPU time, of that of the first step; 0 for none
}

// grow compares steps with the first one, in interleaved rounds: the agent's CPU time for a
// request at a fixed rate, and requests/s without.
func (b *bench) grow(ctx context.Context, topic string, steps []step) error {
	cpu, perSecond := make([][]float64, len(steps)), make([][]float64, len(steps))
	fixed := make([]point, len(steps)) // of the last round
	round := func(i int, agent *testbed.Agent) error {
		s := steps[i]
		if s.prime != nil {
			if err := s.prime(); err != nil {
				return err
			}
		}
		p, err := measureLoad(ctx, agent, b.pods, s.load.at(rate, b.length))
		if err != nil {
			return err
		}
		q, err := measureLoad(ctx, agent, b.pods, s.load.at(0, b.length))
		if err != nil {
			return err
		}
		fixed[i] = p
		cpu[i] = append(cpu[i], float64(p.cpu.Nanoseconds())/1000)
		perSecond[i] = append(perSecond[i], q.perSecond())
		return nil
	}
	for range b.rounds {
		for i, s := range steps {
			progress("%s: %s", topic, s.name)
			err := withAgent(ctx, s.world, func(agent *testbed.Agent) error { return round(i, agent) }, b.flags(s)...)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", topic, s.name, err)
			}
		}
	}
	for i, s := range steps {
		ratio := medianRatio(cpu[i], cpu[0])
		r := b.report.Add(topic, s.name+": CPU for a request", measure.Median(cpu[i]), "µs")
		r.Notef("%.2f of the first; %.0f requests/s without a rate, %.2f of the first; p99 at %d/s %s",
			ratio, measure.Median(perSecond[i]), medianRatio(perSecond[i], perSecond[0]), rate, fixed[i].P99.Round(10*time.Microsecond))
		if t := fixed[i].Throttled; t > 0 {
			r.Note += fmt.Sprintf("; %.0f %% throttled", math.Round(100*float64(t)/float64(fixed[i].Requests)))
		}
		if s.goal > 0 {
			b.report.Add(topic, s.name+": ratio to the first", ratio, "").AtMost(s.goal)
		}
	}
	return nil
}

// medianRatio is that of the rounds of two steps.
func medianRatio(values, to []float64) float64 {
	var ratios []float64
	for i := range values {
		ratios = append(ratios, values[i]/to[i])
	}
	return measure.Median(ratios)
}

func (b *bench) flags(s step) []string {
	connections := 0
	for _, p := range s.load.Pods {
		connections += p.Active + p.Idle
	}
	return append([]string{fmt.Sprintf("--max-connections=%d", max(512, connections+100))}, noLimit...)
}

// growIdentities compares the small cluster with the large one, as far as it is filled.
func (b *bench) growIdentities(ctx context.Context, identities int) error {
	asking := min(few, len(b.pods))
	return b.grow(ctx, fmt.Sprintf("identities, %d", identities), []step{
		{name: fmt.Sprintf("%d identities, %d pods ask", few, asking), world: b.small, load: some(asking, 3)},
		{name: fmt.Sprintf("%d identities, %d pods ask", identities, asking), world: b.large, load: some(asking, 3), goal: 1.05},
	})
}

// growPods has all pods ask, with as many connections as ten of them.
func (b *bench) growPods(ctx context.Context) error {
	var steps []step
	for _, n := range []int{few, 50, 250} {
		n = min(n, len(b.pods))
		s := step{name: fmt.Sprintf("%d pods ask, %d connections each", n, len(b.pods)/n), world: b.small, load: some(n, len(b.pods)/n)}
		steps = append(steps, s)
	}
	last := steps[len(steps)-1]
	last.name, last.world, last.goal = fmt.Sprintf("%d pods ask, %d identities", len(b.pods), b.identities), b.large, 1.05
	return b.grow(ctx, "pods", append(steps, last))
}

// growKeys has all pods ask for more and more tokens. The cache keeps 2,000.
func (b *bench) growKeys(ctx context.Context) error {
	var steps []step
	for _, keys := range b.keys {
		l := some(len(b.pods), 1)
		each := keys / few // of each identity
		for i := range l.Pods {
			l.Pods[i].URLs = nil
			for n := range each {
				l.Pods[i].URLs = append(l.Pods[i].URLs, url(fmt.Sprintf("key-%d", n)))
			}
			l.Pods[i].Warm = l.Pods[i].URLs[i/few%each]
		}
		steps = append(steps, step{
			name: fmt.Sprintf("%d live keys", keys), world: b.small, load: l,
			prime: func() error { return b.prime(ctx, each) },
		})
	}
	return b.grow(ctx, "keys", steps)
}

// prime has the pods of each identity fetch the tokens of so many resources, in equal shares.
func (b *bench) prime(ctx context.Context, resources int) error {
	shares := len(b.pods) / few
	return many(ctx, len(b.pods), func(ctx context.Context, i int) error {
		client := b.pods[i].Client(patience)
		defer client.CloseIdleConnections()
		for n := i / few; n < resources && i/few < shares; n += shares {
			if err := get(ctx, client, "http://"+testbed.MetadataAddress+url(fmt.Sprintf("key-%d", n))); err != nil {
				return err
			}
		}
		return nil
	})
}

// growConnections opens thousands of connections.
func (b *bench) growConnections(ctx context.Context) error {
	const most = 64 // of one pod
	pods := min((b.connections+most-1)/most, len(b.pods))
	idle := some(1, 32)
	others := min(40, len(b.pods)-1)
	for range others {
		idle.Pods = append(idle.Pods, podLoad{Idle: b.connections / others, Warm: url("vault")})
	}
	steps := []step{
		{name: "32 connections", world: b.small, load: some(1, 32)},
		{name: fmt.Sprintf("%d connections, 32 of them active", 32+b.connections/others*others), world: b.small, load: idle, goal: 1.15},
		{name: "1 connection", world: b.small, load: some(1, 1)},
		{name: fmt.Sprintf("%d connections, all active", b.connections), world: b.small, load: some(pods, b.connections/pods)},
	}
	return b.grow(ctx, "connections", steps)
}
