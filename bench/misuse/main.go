// Command misuse measures what pods that misbehave cost the others.
//
// It builds the world of the e2e (kernel, API server, the real binary), with the
// manifest's memory limit in force. One pod asks for its token 500 times a second while
// others do their worst, see misuses. What the good pod sees is compared with what it saw
// when all was quiet, in the same run. Then a hundred pods want a thousand tokens at once,
// and it is counted what comes to the metadata service.
//
// It fails if the agent ends, needs 100 MiB or more, or fails the good pod. What the good
// pod waits is reported beside its bound, and fails nothing: machines are noisy.
//
// main.go says what is measured and prints it, good.go is the pod that measures, bad.go
// those that misbehave, reconnects.go those that give up connections at once, child.go their
// process, cold.go the thousand tokens.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// serverCore is the agent's; this program is to be run on another (see the Makefile).
const serverCore = 0

const (
	goodAddr       = "10.244.0.11"
	metricsAddress = testbed.NodeAddress + ":9090"
	probeAddress   = testbed.NodeAddress + ":8085"

	latency = 20 * time.Millisecond // of IMDS

	maxMemory = 100 << 20 // bytes
	maxRatio  = 3         // of the 99th percentile to its quiet value
)

// errBroken means that the agent did not keep a bound.
var errBroken = errors.New("a bound is broken, see the table")

var identity = imdstest.Identity{ClientID: "ca470000-0000-4000-8000-000000000001"}

func main() {
	seconds := flag.Int("seconds", 10, "length of one measurement")
	only := flag.String("only", "", "measure only what has this in its name, and the quiet")
	number := flag.Int("bad", -1, "play the bad pods; for this program's own use")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := testbed.EnterNode()
	switch {
	case err != nil:
	case *number >= 0:
		err = playBad(ctx, *number)
	default:
		err = run(ctx, time.Duration(*seconds)*time.Second, *only)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "misuse:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, length time.Duration, only string) (err error) {
	w, err := testbed.NewWorld(ctx, imdstest.Config{Identities: []imdstest.Identity{identity}, Latency: latency})
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
	var pods []*testbed.Pod
	for i := range badPods {
		pod, err := addPod(ctx, w, fmt.Sprintf("bad-%d", i), fmt.Sprintf("10.244.0.%d", 12+i))
		if err != nil {
			return err
		}
		pods = append(pods, pod)
	}
	broken := measureMisuse(ctx, w, good, pods, length, only)
	if only != "" || broken != nil && !errors.Is(broken, errBroken) {
		return broken
	}
	return errors.Join(broken, measureCold(ctx, w, good))
}

// addPod makes a pod that is bound to the identity.
func addPod(ctx context.Context, w *testbed.World, name, addr string) (*testbed.Pod, error) {
	pod, err := w.AddPod(addr, testbed.Ptp)
	if err != nil {
		return nil, err
	}
	return pod, w.CreatePod(ctx, "shop", name, addr, map[string]string{"aadpodidbinding": "cart"})
}

// withAgent runs measure beside an agent that is ready, with the manifest's memory limit.
func withAgent(ctx context.Context, w *testbed.World, measure func(*testbed.Agent, *testbed.MemoryLimit) error) (err error) {
	w.IMDS.Reset()
	limit, env, err := testbed.NewManifestMemoryLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, limit.Close()) }()
	agent, err := limit.StartPinnedAgent(serverCore, env, w.Kubeconfig)
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
	return measure(agent, limit)
}

// measureMisuse prints a table, and returns errBroken if a bound in it is.
func measureMisuse(ctx context.Context, w *testbed.World, good *testbed.Pod, pods []*testbed.Pod, length time.Duration, only string) error {
	var quiet result
	broken := false
	fmt.Printf("A good pod asks for its token %d times a second for %s, on %d connections, while another does this:\n\n", goodRate, length, goodConnections)
	fmt.Printf("| the other pod | p50 | ratio | p99 | ratio | at most %d | failed | most memory, MiB | bounds | what came of it |\n", maxRatio)
	fmt.Println("|---|---:|---:|---:|---:|---|---:|---:|---|---|")
	for number, misuse := range misuses {
		if number > 0 && !strings.Contains(misuse.name, only) {
			continue
		}
		err := withAgent(ctx, w, func(agent *testbed.Agent, limit *testbed.MemoryLimit) error {
			if _, err := ask(ctx, good, length/5); err != nil { // warm
				return err
			}
			if misuse.hang {
				w.IMDS.SetLatency(time.Minute)
				defer w.IMDS.SetLatency(latency)
			}
			others, err := startBad(ctx, number, pods)
			if err != nil {
				return err
			}
			got, err := ask(ctx, good, length)
			if err != nil {
				return err
			}
			came, err := others.stop()
			if err != nil {
				return err
			}
			verdict, peak, err := bounds(agent, limit, got)
			if err != nil {
				return err
			}
			broken = broken || verdict != "kept"
			if quiet.p50 == 0 {
				quiet = got
			}
			late := float64(got.p99) / float64(quiet.p99)
			fmt.Printf("| %s | %s | %.2f | %s | %.2f | %s | %d | %.1f | %s | %s |\n", misuse.name,
				got.p50.Round(time.Microsecond), float64(got.p50)/float64(quiet.p50),
				got.p99.Round(time.Microsecond), late, map[bool]string{true: "yes", false: "**no**"}[late <= maxRatio],
				got.failed, float64(peak)/(1<<20), verdict, came)
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", misuse.name, err)
		}
	}
	fmt.Println()
	if broken {
		return errBroken
	}
	return nil
}

// bounds says whether the agent has kept its own, and how much memory it has needed.
func bounds(agent *testbed.Agent, limit *testbed.MemoryLimit, got result) (verdict string, peak int64, err error) {
	if peak, err = limit.Peak(); err != nil {
		return "", 0, err
	}
	kills, err := limit.OOMKills()
	if err != nil {
		return "", 0, err
	}
	select {
	case <-agent.Done():
		log := agent.Log()
		fmt.Fprintf(os.Stderr, "misuse: the end of the log of the agent that has ended:\n%s\n", log[max(0, len(log)-8<<10):])
		return "**the agent has ended**", peak, nil
	default:
	}
	switch {
	case kills > 0:
		return "**killed for its memory**", peak, nil
	case peak >= maxMemory:
		return "**memory**", peak, nil
	case got.failed > 0:
		return "**the good pod's requests failed**", peak, nil
	default:
		return "kept", peak, nil
	}
}
