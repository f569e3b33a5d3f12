package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
)

// starts starts the agent on both cores, and leaves it alone until its memory has settled. The topic
// is what the cluster has.
func (b *bench) starts(ctx context.Context, topic string, maxReady, maxResident float64, flags ...string) error {
	var ready, cpu []time.Duration
	var settled, peak, file []int64
	for range b.rounds {
		err := func() (err error) {
			began := time.Now()
			agent, err := testbed.StartAgent(b.large.Kubeconfig, flags...)
			if err != nil {
				return err
			}
			defer func() {
				_, stopErr := agent.Stop()
				err = errors.Join(err, stopErr)
			}()
			if err := agent.AwaitReady(ctx); err != nil {
				return err
			}
			ready = append(ready, time.Since(began))
			used, err := measure.CPUTime(agent.PID())
			if err != nil {
				return err
			}
			cpu = append(cpu, used)
			select {
			case <-time.After(b.quiet):
			case <-ctx.Done():
				return ctx.Err()
			}
			m, err := measure.MemoryOf(agent.PID())
			settled, peak, file = append(settled, m.Resident), append(peak, m.Peak), append(file, m.File)
			return err
		}()
		if err != nil {
			return fmt.Errorf("starting with %s: %w", topic, err)
		}
	}
	topic = "start, " + topic
	b.report.Add(topic, "to ready", measure.Median(ready).Seconds(), "s").AtMost(maxReady).
		Notef("%d starts, the slowest %.2f s; the API server works on the same cores", len(ready), measure.Quantile(ready, 1).Seconds())
	b.report.Add(topic, "CPU time until ready", measure.Median(cpu).Seconds(), "s")
	b.report.Add(topic, "resident when idle", mib(measure.Median(settled)), "MiB").AtMost(maxResident).
		Notef("%s after ready; %.1f MiB of it are pages of the program's file", b.quiet, mib(measure.Median(file)))
	b.report.Add(topic, "highest resident until then", mib(measure.Quantile(peak, 1)), "MiB")
	return nil
}

// loadedMemory is that of the large cluster's agent while all pods ask.
func (b *bench) loadedMemory(ctx context.Context) error {
	return withAgent(ctx, b.large, func(agent *testbed.Agent) error {
		if _, err := measureLoad(ctx, agent, b.pods, some(len(b.pods), 1).at(0, 5*b.length)); err != nil {
			return err
		}
		m, err := measure.MemoryOf(agent.PID())
		b.report.Add("memory", fmt.Sprintf("highest resident, %d pods ask, %d identities", len(b.pods), b.identities), mib(m.Peak), "MiB")
		return err
	}, noLimit...)
}

// idleConnections measures what a connection costs that has asked once.
func (b *bench) idleConnections(ctx context.Context) error {
	each := b.connections / min(40, len(b.pods))
	var l load
	for range min(40, len(b.pods)) {
		l.Pods = append(l.Pods, podLoad{Idle: each, Warm: url("vault")})
	}
	n := each * len(l.Pods)
	return withAgent(ctx, b.small, func(agent *testbed.Agent) error {
		look := func() (resident, heap, stacks float64, err error) {
			m, err := measure.Scrape(ctx, metricsURL)
			if err != nil {
				return 0, 0, 0, err
			}
			memory, err := measure.MemoryOf(agent.PID())
			return float64(memory.Resident), m["go_memstats_heap_inuse_bytes"], m["go_memstats_stack_inuse_bytes"], err
		}
		if _, err := measureLoad(ctx, agent, b.pods, some(few, 1).at(rate, b.length)); err != nil { // what any load needs
			return err
		}
		resident, heap, stacks, err := look()
		if err != nil {
			return err
		}
		r, err := startLoad(ctx, b.pods, l)
		if err != nil {
			return err
		}
		select {
		case <-time.After(b.quiet):
		case <-ctx.Done():
		}
		residentAfter, heapAfter, stacksAfter, err := look()
		_ = r.end(nil)
		kib := func(after, before float64) float64 { return (after - before) / float64(n) / (1 << 10) }
		b.report.Add("memory", "resident, for each idle connection", kib(residentAfter, resident), "KiB").AtMost(10).
			Notef("%d connections, each has asked once; the kernel's buffers are not part of it", n)
		b.report.Add("memory", "Go's heap and stacks, for each idle connection", kib(heapAfter+stacksAfter, heap+stacks), "KiB").
			Notef("%.1f of it stacks", kib(stacksAfter, stacks))
		return err
	}, fmt.Sprintf("--max-connections=%d", n+100))
}

const metricsURL = "http://" + testbed.NodeAddress + ":9090/metrics"
