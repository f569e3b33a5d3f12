package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
)

// get asks for a token once.
func get(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s: %s", resp.Status, body)
	}
	return err
}

// misses compares tokens that are not in memory with tokens that the node asks IMDS for itself,
// in turns. No two are for one resource.
func (b *bench) misses(ctx context.Context) error {
	const warm, few = "http://" + testbed.MetadataAddress, 60
	pods := b.pods[:min(few, len(b.pods))]
	var clients []*http.Client
	for _, pod := range pods {
		client := pod.Client(patience)
		defer client.CloseIdleConnections()
		clients = append(clients, client)
	}
	node := &http.Client{Timeout: patience, Transport: &http.Transport{}} // iptables leaves the node's own requests alone
	defer node.CloseIdleConnections()
	ids := "&client_id=" + b.ids[0].ClientID
	defer b.small.IMDS.SetLatency(0)
	return withAgent(ctx, b.small, func(*testbed.Agent) error {
		for _, client := range clients {
			if err := get(ctx, client, warm+url("vault")); err != nil {
				return err
			}
		}
		for _, at := range []struct {
			latency time.Duration
			samples int
		}{{time.Millisecond, 300}, {10 * time.Millisecond, 200}, {100 * time.Millisecond, 100}} {
			b.small.IMDS.SetLatency(at.latency)
			var direct, through []time.Duration
			for i := range min(at.samples, b.samples) {
				target := fmt.Sprintf("%s%s", warm, url(fmt.Sprintf("miss-%s-%d", at.latency, i)))
				began := time.Now()
				if err := get(ctx, node, target+ids); err != nil {
					return fmt.Errorf("the node: %w", err)
				}
				direct = append(direct, time.Since(began))
				began = time.Now()
				if err := get(ctx, clients[i%len(clients)], target); err != nil {
					return fmt.Errorf("a pod: %w", err)
				}
				through = append(through, time.Since(began))
			}
			over := func(q float64) float64 {
				return float64((measure.Quantile(through, q) - measure.Quantile(direct, q)).Nanoseconds()) / 1000
			}
			name := fmt.Sprintf("over IMDS directly, which takes %s", at.latency)
			b.report.Add("miss", name+", p50", over(0.5), "µs").AtMost(150).Notef("%s through the agent, %s directly; %d tokens each",
				measure.Median(through).Round(time.Microsecond), measure.Median(direct).Round(time.Microsecond), len(direct))
			b.report.Add("miss", name+", p99", over(0.99), "µs")
		}
		return nil
	}, noLimit...)
}

// herd has many callers ask for one key at the same moment, on as many connections.
func (b *bench) herd(ctx context.Context) error {
	const latency = time.Second // so that all come while it is fetched
	each := b.callers / len(b.pods)
	var l load
	for range b.pods {
		l.Pods = append(l.Pods, podLoad{Active: each, Warm: url("vault"), URLs: []string{url("herd") + "&client_id=" + common.ClientID}})
	}
	return withAgent(ctx, b.small, func(agent *testbed.Agent) error {
		topic := fmt.Sprintf("herd of %d callers, one key", each*len(b.pods))
		got, err := b.atOnce(ctx, topic, l, latency, 1)
		if err != nil {
			return err
		}
		b.report.Add(topic, "all are answered after", got.Seconds, "s").Notef("IMDS takes %s of it; p50 %s", latency, got.P50.Round(time.Millisecond))
		memory, err := measure.MemoryOf(agent.PID())
		b.report.Add(topic, "highest resident memory", mib(memory.Peak), "MiB").Notef("%d connections; the manifest allows 512", each*len(b.pods))
		return err
	}, fmt.Sprintf("--max-connections=%d", b.callers+100))
}

// ownKeys has all pods ask for a token of their own at the same moment, within IMDS's limits.
func (b *bench) ownKeys(ctx context.Context) error {
	var l load
	for i := range b.pods {
		l.Pods = append(l.Pods, podLoad{Active: 1, Warm: url("vault"), URLs: []string{url(fmt.Sprintf("own-%d", i))}})
	}
	return withAgent(ctx, b.small, func(*testbed.Agent) error {
		topic := fmt.Sprintf("%d pods with a key each", len(b.pods))
		got, err := b.atOnce(ctx, topic, l, 20*time.Millisecond, len(b.pods))
		if err != nil {
			return err
		}
		b.report.Add(topic, "all are answered after", got.Seconds, "s").Notef("18 requests a second is the limit: %.1f s", float64(len(b.pods))/18)
		return nil
	})
}

// atOnce applies a load for which IMDS, with this latency, is to be asked so many times, and
// reports whether it was, and whether all were served.
func (b *bench) atOnce(ctx context.Context, topic string, l load, latency time.Duration, fetches int) (result, error) {
	r, err := startLoad(ctx, b.pods, l)
	if err != nil {
		return result{}, err
	}
	b.small.IMDS.Reset()
	b.small.IMDS.SetLatency(latency)
	defer b.small.IMDS.SetLatency(0)
	got, err := r.run()
	if err != nil {
		return result{}, err
	}
	b.report.Add(topic, "requests to IMDS", float64(b.small.IMDS.Requests()), "").Exactly(float64(fetches))
	b.report.Add(topic, "not served", float64(got.Failed+got.Throttled), "").Exactly(0).Notef("%s", got.Error)
	return got, nil
}

// podEvents has pods ask before their objects exist.
func (b *bench) podEvents(ctx context.Context) error {
	var fromCreation, fromAddress []time.Duration
	err := withAgent(ctx, b.small, func(*testbed.Agent) error {
		if err := get(ctx, b.pods[0].Client(patience), "http://"+testbed.MetadataAddress+url("vault")); err != nil {
			return err
		}
		for i := range min(20, b.samples) {
			name, addr := fmt.Sprintf("new-%d", i), fmt.Sprintf("10.244.100.%d", i+1)
			pod, err := b.small.AddPod(addr, testbed.Ptp)
			if err != nil {
				return err
			}
			client := pod.Client(patience)
			var answered time.Time
			var askErr error
			var asking sync.WaitGroup
			asking.Go(func() {
				askErr = get(ctx, client, "http://"+testbed.MetadataAddress+url("vault"))
				answered = time.Now()
			})
			time.Sleep(50 * time.Millisecond) // it waits in the agent
			created := time.Now()
			if err := b.small.CreatePod(ctx, namespace(0), name, "", map[string]string{"aadpodidbinding": service(0)}); err != nil {
				return err
			}
			addressed := time.Now()
			if err := b.small.SetPodAddress(ctx, namespace(0), name, addr); err != nil {
				return err
			}
			asking.Wait()
			if askErr != nil {
				return askErr
			}
			fromCreation, fromAddress = append(fromCreation, answered.Sub(created)), append(fromAddress, answered.Sub(addressed))
			client.CloseIdleConnections()
			if err := b.small.DeletePod(ctx, namespace(0), name); err != nil {
				return err
			}
			if err := pod.Close(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	add := func(name string, took []time.Duration) {
		b.report.Add("pod event", name, ms(measure.Median(took)), "ms").Notef("p99 %.1f ms of %d; the API server's part included", ms(measure.Quantile(took, 0.99)), len(took))
	}
	add("from the pod's creation to the answer that waits, p50", fromCreation)
	add("from its address being written, p50", fromAddress)
	return nil
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }
