// Command scale measures what grows with the cluster and the node: a cluster of 10,000
// AzureIdentities and as many bindings, 250 pods on the node and 20,000 elsewhere, on a real
// API server; thousands of tokens and connections; many callers at once. Beside it stands a
// cluster with ten identities and the same pods of the node.
//
// main.go says what is measured, cluster.go fills the API servers with the objects of
// objects.go, generator.go is the load generator and load.go puts it to work. growth.go,
// start.go, latency.go, upkeep.go, fleet.go and accounts.go measure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// plan is how much is measured, and for how long.
type plan struct {
	identities, pods, others int // in the large cluster
	accounts                 int // service accounts, in the large cluster
	keys                     []int
	connections, callers     int
	agents                   int // that restart at once
	samples, rounds          int
	length                   time.Duration // of one load
	quiet                    time.Duration // until memory has settled
	watch                    time.Duration // of an idle agent, and of upgrades
}

var (
	full = plan{
		identities: 10_000, pods: 250, others: 20_000, accounts: 10_000, keys: []int{10, 1000, 2000, 4000},
		connections: 2000, callers: 10_000, agents: 5, samples: 300, rounds: 3,
		length: 2 * time.Second, quiet: 10 * time.Second, watch: 15 * time.Second,
	}
	// short shows that everything still works.
	short = plan{
		identities: 50, pods: 10, others: 10, accounts: 50, keys: []int{10},
		connections: 50, callers: 100, agents: 2, samples: 5, rounds: 1,
		length: 100 * time.Millisecond, quiet: 100 * time.Millisecond, watch: 1 * time.Second,
	}
)

// bench is a run.
type bench struct {
	plan
	*objects
	small, large *testbed.World // clusters of one node
	pods         []*testbed.Pod
	report       *measure.Report
	only         *regexp.Regexp // names of steps
}

func main() {
	isShort := flag.Bool("short", false, "little of everything, to see that it works; the figures mean nothing")
	hold := flag.Bool("hold", false, "build the large cluster, say how to reach it, and wait for Ctrl-C")
	jsonFile := flag.String("json", "", "file to write the results to")
	only := flag.String("only", "", "regular expression: take only the steps whose names match")
	generator := flag.Bool("generate", false, "be the load generator; for this program's own use")
	fleet := flag.String("fleet", "", "be many agents; for this program's own use")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := testbed.EnterNode()
	switch {
	case err != nil:
	case *generator:
		err = generate(ctx)
	case *fleet != "":
		err = playFleet(ctx, *fleet)
	default:
		b := &bench{plan: full}
		b.only, err = regexp.Compile(*only)
		if err != nil {
			break
		}
		if *isShort {
			b.plan = short
		}
		err = b.run(ctx, *hold, *jsonFile)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, hold bool, jsonFile string) (err error) {
	root, err := testbed.Root()
	if err != nil {
		return err
	}
	b.report = measure.NewReport("make bench-scale", filepath.Join(root, "bin", "nmi"), filepath.Join(root, ".cache", "bin", "kube-apiserver"))
	b.objects = newObjects(b.plan)
	b.large, err = testbed.NewWorld(ctx, imdstest.Config{Identities: append(b.ids[:min(b.plan.pods, len(b.ids))], common)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.large.Close()) }()
	if b.small, err = b.large.AddCluster(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.small.Close()) }()
	for i := range b.plan.pods {
		pod, err := b.large.AddPod(podAddress(i), testbed.Ptp)
		if err != nil {
			return err
		}
		b.pods = append(b.pods, pod)
	}
	large, err := b.fill(ctx)
	if err != nil {
		return err
	}
	if hold {
		if err := large.addIdentities(ctx, min(50, b.identities), b.identities); err != nil {
			return err
		}
		fmt.Printf("KUBECONFIG=%s nsenter --net=/proc/%d/ns/net bin/nmi --node=%s ...\n", b.large.Kubeconfig, os.Getpid(), testbed.NodeName)
		<-ctx.Done()
		return nil
	}
	if err := b.measure(ctx, large); err != nil {
		return err
	}
	return errors.Join(b.report.Markdown(os.Stdout), b.report.WriteJSON(jsonFile))
}

// fill makes the objects of the clusters, but most identities.
func (b *bench) fill(ctx context.Context) (large *filler, err error) {
	small, err := newFiller(b.objects, b.small)
	if err != nil {
		return nil, err
	}
	if large, err = newFiller(b.objects, b.large); err != nil {
		return nil, err
	}
	progress("filling the clusters")
	for _, step := range []func() error{
		func() error { return small.addNamespaces(ctx) },
		func() error { return small.addIdentities(ctx, 0, few) },
		func() error { return small.addCommon(ctx) },
		func() error { return small.addNodePods(ctx, few) },
		func() error { return large.addNamespaces(ctx) },
		func() error { return large.addNodePods(ctx, b.identities) },
		func() error { return large.addOtherPods(ctx, b.others) },
		func() error { return large.addIdentities(ctx, 0, min(50, b.identities)) },
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("filling a cluster: %w", err)
		}
	}
	return large, nil
}

const filling = "filling" // the step that others need

// measure measures, and fills the large cluster meanwhile.
func (b *bench) measure(ctx context.Context, large *filler) error {
	had := min(50, b.identities)
	grow := func(to int) func(context.Context) error {
		return func(ctx context.Context) error {
			from := had
			had = max(had, min(to, b.identities))
			return large.addIdentities(ctx, from, had)
		}
	}
	identities := func(n int) string { return fmt.Sprintf("%d identities", n) }
	growth := func(ctx context.Context) error { return b.growIdentities(ctx, had) }
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"misses", b.misses},
		{"herd", b.herd},
		{"a key for each pod", b.ownKeys},
		{"pod events", b.podEvents},
		{"reconciliation", b.reconcile},
		{"upgrades", b.upgrade},
		{"idle connections", b.idleConnections},
		{"starts", func(ctx context.Context) error { return b.starts(ctx, identities(had), 0.3, 30) }},
		{filling, grow(1000)},
		{"identities", growth},
		{filling, grow(b.identities)},
		{"starts", func(ctx context.Context) error { return b.starts(ctx, identities(had), 1, 40) }},
		{"identities", growth},
		{"restarts", b.restarts},
		{"service accounts", func(ctx context.Context) error { return b.serviceAccounts(ctx, large) }},
		{"loaded memory", b.loadedMemory},
		{"pods", b.growPods},
		{"keys", b.growKeys},
		{"connections", b.growConnections},
	} {
		if step.name != filling && !b.only.MatchString(step.name) {
			continue
		}
		progress("%s", step.name)
		if err := step.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

var began = time.Now()

// progress goes to stderr, so that what is printed can be kept as it is.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%4.0f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}
