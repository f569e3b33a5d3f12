// Command misuse measures what pods that misbehave cost the others.
//
// It builds the world of the e2e (kernel, API server, the real binary). One pod asks
// for its token 500 times a second while another does its worst: connections that
// trickle, ten thousand that say nothing, five thousand requests a second for tokens
// that are not in memory. What the good pod sees is compared with what it saw when
// all was quiet, in the same run. Then a hundred pods want a thousand tokens at once,
// and it is counted what comes to the metadata service.
//
// main.go says what is measured and prints it, good.go is the pod that measures, bad.go
// the one that misbehaves, cold.go the thousand tokens.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// serverCore is the agent's; this program is to be run on another (see the Makefile).
const serverCore = 0

const (
	goodAddr = "10.244.0.11"
	badAddr  = "10.244.0.12"
)

var identity = imdstest.Identity{ClientID: "ca470000-0000-4000-8000-000000000001"}

func main() {
	seconds := flag.Int("seconds", 10, "length of one measurement")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := testbed.EnterNode()
	if err == nil {
		err = run(ctx, time.Duration(*seconds)*time.Second)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "misuse:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, length time.Duration) (err error) {
	w, err := testbed.NewWorld(ctx, imdstest.Config{Identities: []imdstest.Identity{identity}, Latency: 20 * time.Millisecond})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := errors.Join(w.CreateNamespace(ctx, "shop"), w.Bind(ctx, "shop", "cart", identity)); err != nil {
		return err
	}
	good, err := addPod(ctx, w, "good", goodAddr)
	if err != nil {
		return err
	}
	bad, err := addPod(ctx, w, "bad", badAddr)
	if err != nil {
		return err
	}
	if err := measureMisuse(ctx, w, good, bad, length); err != nil {
		return err
	}
	return measureCold(ctx, w, good)
}

// addPod makes a pod that is bound to the identity.
func addPod(ctx context.Context, w *testbed.World, name, addr string) (*testbed.Pod, error) {
	pod, err := w.AddPod(addr, testbed.Ptp)
	if err != nil {
		return nil, err
	}
	return pod, w.CreatePod(ctx, "shop", name, addr, map[string]string{"aadpodidbinding": "cart"})
}

// withAgent runs measure beside an agent that is ready.
func withAgent(ctx context.Context, w *testbed.World, measure func(*testbed.Agent) error) (err error) {
	w.IMDS.Reset()
	agent, err := testbed.StartPinnedAgent(serverCore, w.Kubeconfig)
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
	return measure(agent)
}

func measureMisuse(ctx context.Context, w *testbed.World, good, bad *testbed.Pod, length time.Duration) error {
	var quiet result
	fmt.Printf("A good pod asks for its token %d times a second for %s, on %d connections, while another does this:\n\n", goodRate, length, goodConnections)
	fmt.Println("| the other pod | p50 | ratio | p99 | ratio | failed | agent's memory, MiB | what the other got |")
	fmt.Println("|---|---:|---:|---:|---:|---:|---:|---|")
	for _, misuse := range misuses {
		err := withAgent(ctx, w, func(agent *testbed.Agent) error {
			if _, err := ask(ctx, good, length/5); err != nil { // warm
				return err
			}
			busy, stop := context.WithCancel(ctx)
			defer stop()
			outcome := make(chan string, 1)
			started := make(chan struct{})
			go func() { outcome <- misuse.do(busy, bad, started) }()
			<-started
			got, err := ask(ctx, good, length)
			if err != nil {
				return err
			}
			resident, _, err := agent.Memory()
			if err != nil {
				return err
			}
			stop()
			if quiet.p50 == 0 {
				quiet = got
			}
			fmt.Printf("| %s | %s | %.2f | %s | %.2f | %d | %.1f | %s |\n", misuse.name,
				got.p50.Round(time.Microsecond), float64(got.p50)/float64(quiet.p50),
				got.p99.Round(time.Microsecond), float64(got.p99)/float64(quiet.p99),
				got.failed, float64(resident)/(1<<20), <-outcome)
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", misuse.name, err)
		}
	}
	fmt.Println()
	return nil
}
