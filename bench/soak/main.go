// Command soak runs the agent for half an hour on a node where everything changes, and checks
// every answer.
//
// It builds the world of the e2e (kernel, API server, the real binary). 24 pods ask for tokens
// all the time. Pods end, and their addresses go to pods of other identities, whatever the API
// server has heard; AzureIdentities and bindings change; IMDS throttles, fails and hangs; now
// and then another agent takes over. Each token must name the identity that its pod was
// entitled to when it asked, see judge.
//
// It fails if an answer is wrong or lost, or if a pod never got a token. That memory,
// goroutines and descriptors stay flat is reported.
//
// main.go builds and reports, client.go asks, judge.go and entitlement.go say what is right,
// churn.go and identities.go change things, sample.go looks at the agent's process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const (
	slots     = 24
	churners  = 3
	selectors = 12

	// lifetime makes tokens be refreshed several times in half an hour: those of less than two
	// hours are refreshed five to ten minutes before they expire.
	lifetime = 11 * time.Minute
	latency  = 20 * time.Millisecond
)

// errBroken means that the agent did not do what it promises.
var errBroken = errors.New("answers were wrong or lost, or pods were not served: see the table")

// soak is a run.
type soak struct {
	world     *testbed.World
	network   sync.Mutex // guards the world's Network
	selectors []*selector
	slots     []*slot
	agent     atomic.Pointer[testbed.Agent] // that serves
	tally     tally
	samples   []sample

	pods, identityChanges, faults, upgrades atomic.Int64
}

func main() {
	length := flag.Duration("length", 30*time.Minute, "of the run")
	upgrades := flag.Duration("upgrades", 5*time.Minute, "time between upgrades; a third of -length if that is less")
	jsonFile := flag.String("json", "", "file to write the results to")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := testbed.EnterNode()
	if err == nil {
		err = run(ctx, *length, min(*upgrades, *length/3), *jsonFile)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, length, upgrades time.Duration, jsonFile string) (err error) {
	s := &soak{}
	s.tally.complain = func(text string) { fmt.Fprintln(os.Stderr, text) }
	var identities []imdstest.Identity
	s.selectors, identities = newSelectors(selectors)
	// The limits are those of a virtual machine.
	s.world, err = testbed.NewWorld(ctx, imdstest.Config{Identities: identities, Latency: latency, Lifetime: lifetime, PerSecond: 20, AtOnce: 5})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.world.Close()) }()
	if err := s.prepare(ctx); err != nil {
		return err
	}
	defer func() {
		_, stopErr := s.agent.Load().Stop()
		err = errors.Join(err, stopErr)
	}()
	if err := s.agent.Load().AwaitReady(ctx); err != nil {
		return err
	}
	if err := s.change(ctx, length, upgrades); err != nil {
		return err
	}
	return s.report(length, jsonFile)
}

// prepare makes the selectors' objects and the first pods, and starts the agent.
func (s *soak) prepare(ctx context.Context) error {
	if err := s.world.CreateNamespace(ctx, namespace); err != nil {
		return err
	}
	for _, sel := range s.selectors {
		if err := sel.change(sel.clientID(), func() error { return sel.write(ctx, s.world) }); err != nil {
			return err
		}
	}
	agent, err := testbed.StartAgent(s.world.Kubeconfig)
	if err != nil {
		return err
	}
	s.agent.Store(agent)
	return nil
}

// change runs all that changes side by side for the length of the run, then lets the pods
// finish.
func (s *soak) change(ctx context.Context, length, upgrades time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	lasting := context.WithoutCancel(ctx)
	for i := range slots {
		at := &slot{addr: fmt.Sprintf("10.244.0.%d", 11+i)}
		s.slots = append(s.slots, at)
		p, err := s.connect(lasting, at, "")
		if err != nil {
			return err
		}
		if err := s.announce(lasting, p); err != nil {
			return err
		}
	}
	for i := range churners {
		const share = slots / churners
		group.Go(func() error { return s.churn(ctx, s.slots[i*share:(i+1)*share]) })
	}
	group.Go(func() error { return s.changeIdentities(ctx) })
	group.Go(func() error { return s.disturbIMDS(ctx) })
	group.Go(func() error { return s.upgrade(ctx, upgrades) })
	group.Go(func() error { return s.takeSamples(ctx, min(10*time.Second, length/15)) })
	err := group.Wait()
	for _, at := range s.slots {
		at.pod.end(&s.tally)
	}
	return err
}

func (s *soak) report(length time.Duration, jsonFile string) error {
	r := measure.NewReport(fmt.Sprintf("make bench-soak, %s", length))
	t := &s.tally
	for v := range verdicts {
		row := r.Add("answers", v.String(), float64(t.counts[v].Load()), "")
		if v == wrong || v == lost {
			row.Exactly(0).Notef("%s", t.first[v])
		}
	}
	r.Add("pods", "pods that came", float64(s.pods.Load()), "").Notef("on %d addresses", slots)
	r.Add("pods", fmt.Sprintf("never served, in more than %s", patience), float64(len(t.unserved)), "").Exactly(0)
	r.Add("pods", "address written to first token, p50", measure.Median(t.firsts).Seconds()*1000, "ms")
	r.Add("pods", "the same, p99", measure.Quantile(t.firsts, 0.99).Seconds()*1000, "ms").Notef("first tokens of a resource meet IMDS's failures")
	r.Add("changes", "identities and bindings", float64(s.identityChanges.Load()), "")
	r.Add("changes", "failures of IMDS injected", float64(s.faults.Load()), "")
	r.Add("changes", "upgrades", float64(s.upgrades.Load()), "").AtLeast(1)
	atOnce, perSecond := s.world.IMDS.Peak()
	r.Add("IMDS", "requests", float64(s.world.IMDS.Requests()), "")
	r.Add("IMDS", "most within any second", float64(perSecond), "").AtMost(20)
	r.Add("IMDS", "most at once", float64(atOnce), "").AtMost(5)
	for _, c := range sampled {
		first, last, perHour := trend(s.samples, c.value)
		r.Add("process", c.name+", first third", first, c.unit)
		r.Add("process", c.name+", last third", last, c.unit).Notef("%+.1f an hour while one agent runs", perHour)
	}
	if err := r.Markdown(os.Stdout); err != nil {
		return err
	}
	printSamples(s.samples)
	if err := r.WriteJSON(jsonFile); err != nil {
		return err
	}
	if t.counts[wrong].Load()+t.counts[lost].Load() > 0 || len(t.unserved) > 0 {
		return errBroken
	}
	return nil
}
