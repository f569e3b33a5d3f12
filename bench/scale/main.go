// Command scale measures the agent in a large cluster: 10,000 AzureIdentities and
// as many bindings, 250 pods on the node and 20,000 elsewhere, on a real API
// server. Beside it stands a cluster with ten identities and the same pods of the
// node; the load is taken from the two in turn.
//
// main.go says what is measured and prints it, cluster.go fills the API servers
// with the objects of objects.go, start.go starts the agent and reads what the
// kernel knows of it, load.go lets pods ask.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/podidentity/nmi/bench/wrk"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// What the agent must keep to.
const (
	targetReady   = 1500 * time.Millisecond
	targetSettled = 40 << 20
	targetPeak    = 80 << 20
	targetRatio   = 0.95
)

const (
	starts = 3
	rounds = 3 // of the load, in each cluster
)

// plan is what can be chosen.
type plan struct {
	identities, pods, others int
	quiet, load, round       time.Duration
	hold                     bool
}

func main() {
	var p plan
	flag.IntVar(&p.identities, "identities", 10_000, "AzureIdentities, and as many bindings")
	flag.IntVar(&p.pods, "pods", 250, "pods on the node")
	flag.IntVar(&p.others, "others", 20_000, "pods on other nodes")
	flag.DurationVar(&p.quiet, "quiet", 30*time.Second, "from ready to settled")
	flag.DurationVar(&p.load, "load", 30*time.Second, "length of the load under which memory is measured")
	flag.DurationVar(&p.round, "round", 10*time.Second, "length of each load that is compared")
	flag.BoolVar(&p.hold, "hold", false, "build the large cluster, say how to reach it, and wait for Ctrl-C")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := testbed.EnterNode()
	if err == nil {
		err = run(ctx, p)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, p plan) (err error) {
	objects := newObjects(p)
	w, err := testbed.NewWorld(ctx, imdstest.Config{Identities: objects.asked()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	var pods []*testbed.Pod
	for i := range askers {
		pod, err := w.AddPod(podAddress(i), testbed.Ptp)
		if err != nil {
			return err
		}
		pods = append(pods, pod)
	}
	began := time.Now()
	if err := objects.fill(ctx, w, p.identities, p.others); err != nil {
		return fmt.Errorf("filling the large cluster: %w", err)
	}
	progress("the large cluster took %.0f s to fill", time.Since(began).Seconds())
	if p.hold {
		fmt.Printf("KUBECONFIG=%s nsenter --net=/proc/%d/ns/net bin/nmi --node=%s ...\n", w.Kubeconfig, os.Getpid(), testbed.NodeName)
		<-ctx.Done()
		return nil
	}
	small, err := w.AddCluster(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, small.Close()) }()
	if err := objects.fill(ctx, small, fewIdentities, 0); err != nil {
		return fmt.Errorf("filling the small cluster: %w", err)
	}

	var r report
	if r.bytes, err = startBytes(ctx, w); err != nil {
		return fmt.Errorf("counting bytes: %w", err)
	}
	for i := range starts {
		last := i == starts-1
		s, err := measureStart(ctx, w, pods, p, last)
		if err != nil {
			return fmt.Errorf("start %d: %w", i+1, err)
		}
		progress("start %d: %s", i+1, s)
		r.starts = append(r.starts, s)
	}
	for i := range rounds {
		for _, in := range []struct {
			world   *testbed.World
			results *[]wrk.Result
		}{{small, &r.small}, {w, &r.large}} {
			got, err := measureLoad(ctx, in.world, pods, p.round)
			if err != nil {
				return fmt.Errorf("load, round %d: %w", i+1, err)
			}
			progress("load: %+v", got)
			*in.results = append(*in.results, got)
		}
	}
	r.print(p)
	return nil
}

// report is all that was measured.
type report struct {
	bytes        int64
	starts       []start
	small, large []wrk.Result
}

func (r report) print(p plan) {
	ready := median(r.starts, func(s start) time.Duration { return s.ready })
	cpu := median(r.starts, func(s start) time.Duration { return s.cpu })
	settled := median(r.starts, func(s start) int64 { return s.settled.resident })
	file := median(r.starts, func(s start) int64 { return s.settled.file })
	peak := highest(r.starts, func(s start) int64 { return s.peak })
	loaded := r.starts[len(r.starts)-1].loaded
	rate := func(r wrk.Result) float64 { return r.PerSecond }
	ratios := make([]float64, len(r.large))
	for i := range ratios {
		ratios[i] = r.large[i].PerSecond / r.small[i].PerSecond
	}
	ratio := median(ratios, func(f float64) float64 { return f })

	fmt.Printf("\n%d identities and bindings, %d pods on the node and %d elsewhere; %d starts, %d loads of %s in each cluster, in turn.\n\n",
		p.identities, p.pods, p.others, starts, rounds, p.round)
	fmt.Println("| what | measured | target | |")
	fmt.Println("|---|---:|---:|---|")
	line := func(what, measured, target string, met bool) {
		verdict := "met"
		if !met {
			verdict = "MISSED"
		}
		fmt.Printf("| %s | %s | %s | %s |\n", what, measured, target, verdict)
	}
	line("start to ready, median", seconds(ready), seconds(targetReady), ready <= targetReady)
	line(fmt.Sprintf("resident, %s after ready, median", p.quiet), mib(settled), mib(targetSettled), settled <= targetSettled)
	line("highest resident, start to settled", mib(peak), mib(targetPeak), peak <= targetPeak)
	line(fmt.Sprintf("highest resident, %s of load", p.load), mib(loaded), mib(targetPeak), loaded <= targetPeak)
	line("requests/s, large cluster to small, median", fmt.Sprintf("%.3f", ratio), fmt.Sprintf("%.2f", targetRatio), ratio >= targetRatio)
	plain := func(what, measured string) { fmt.Printf("| %s | %s | | |\n", what, measured) }
	plain("settled: pages of the program's file among it", mib(file))
	plain("CPU time of the start, median", seconds(cpu))
	plain("read from the API server until ready, TLS included", mib(r.bytes))

	fmt.Println("\n| start | ready | CPU | peak until ready | peak until settled | settled |")
	fmt.Println("|---|---:|---:|---:|---:|---:|")
	for i, s := range r.starts {
		fmt.Printf("| %d | %s | %s | %s | %s | %s |\n", i+1, seconds(s.ready), seconds(s.cpu), mib(s.readyPeak), mib(s.peak), mib(s.settled.resident))
	}
	fmt.Printf("\nLoad: cached tokens, %d pods with %d connections each, server and clients on a core each. Percentiles are those of the slowest pod.\n\n", askers, connections)
	fmt.Println("| round | small, requests/s | p50 | p99 | large, requests/s | p50 | p99 | ratio |")
	fmt.Println("|---|---:|---:|---:|---:|---:|---:|---:|")
	for i := range r.large {
		s, l := r.small[i], r.large[i]
		fmt.Printf("| %d | %.0f | %s | %s | %.0f | %s | %s | %.3f |\n", i+1, s.PerSecond, s.P50, s.P99, l.PerSecond, l.P50, l.P99, ratios[i])
	}
	fmt.Printf("\nSpread of the small cluster's rounds, highest to lowest: %.3f\n", highest(r.small, rate)/-highest(r.small, func(r wrk.Result) float64 { return -r.PerSecond }))
}

func median[T any, V cmp.Ordered](all []T, value func(T) V) V {
	values := make([]V, 0, len(all))
	for _, one := range all {
		values = append(values, value(one))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

func highest[T any, V cmp.Ordered](all []T, value func(T) V) V {
	top := value(all[0])
	for _, one := range all[1:] {
		top = max(top, value(one))
	}
	return top
}

func mib(bytes int64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// progress goes to stderr, so that what is printed can be kept as it is.
func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
