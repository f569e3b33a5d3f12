package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
)

const (
	coldPods = 100
	coldKeys = 10 // that each of them wants
)

// measureCold lets a hundred pods ask for ten tokens each that are not in memory, as
// fast as a client comes back that is told to wait; meanwhile a good pod asks for one.
func measureCold(ctx context.Context, w *testbed.World, good *testbed.Pod) error {
	var pods []*testbed.Pod
	for i := range coldPods {
		pod, err := addPod(ctx, w, fmt.Sprintf("cold-%d", i), fmt.Sprintf("10.244.1.%d", i+11))
		if err != nil {
			return err
		}
		pods = append(pods, pod)
	}
	return withAgent(ctx, w, func(*testbed.Agent, *testbed.MemoryLimit) error {
		var first, later, turnedAway, failed atomic.Int64
		var asking sync.WaitGroup
		began := time.Now()
		for i, pod := range pods {
			for n := range coldKeys {
				asking.Go(func() {
					client := pod.Client(time.Minute)
					defer client.CloseIdleConnections()
					for try := 0; time.Since(began) < 2*time.Minute && ctx.Err() == nil; try++ {
						status, err := get(ctx, client, fmt.Sprintf("%s/%d/%d", tokenURL, i, n))
						switch {
						case err == nil && status == 200 && try == 0:
							first.Add(1)
							return
						case err == nil && status == 200:
							later.Add(1)
							return
						case err == nil && status == 429:
							turnedAway.Add(1)
						default:
							failed.Add(1)
						}
						time.Sleep(time.Second)
					}
				})
			}
		}
		time.Sleep(time.Second) // all of them wait
		asked := time.Now()
		status, err := get(ctx, good.Client(time.Minute), tokenURL)
		waited := time.Since(asked)
		if err != nil {
			return fmt.Errorf("the good pod asks: %w", err)
		}
		if status != 200 {
			return fmt.Errorf("the good pod got %d instead of a token", status)
		}
		asking.Wait()
		atOnce, perSecond := w.IMDS.Peak()
		throttled := 0
		for _, call := range w.IMDS.Calls() {
			if call.Status == 429 {
				throttled++
			}
		}
		fmt.Printf("%d pods want %d tokens each, none of them in memory, at once; another pod then wants one.\n\n", coldPods, coldKeys)
		fmt.Println("| what | measured |")
		fmt.Println("|---|---:|")
		for _, line := range [][2]any{
			{"all tokens served after", time.Since(began).Round(100 * time.Millisecond)},
			{"served at the first try, and later", fmt.Sprintf("%d, %d", first.Load(), later.Load())},
			{"told to come back (429)", turnedAway.Load()},
			{"other failures", failed.Load()},
			{"requests at IMDS", w.IMDS.Requests()},
			{"most at once, most within any second", fmt.Sprintf("%d, %d", atOnce, perSecond)},
			{"answered 429 by IMDS", throttled},
			{"the other pod waited (a round of 100 pods takes 5 s)", waited.Round(10 * time.Millisecond)},
		} {
			fmt.Printf("| %v | %v |\n", line[0], line[1])
		}
		return nil
	})
}
