package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
)

// misuses are what bad pods do, of which there are badPods. do closes started when it is
// at its worst, and returns, when ctx ends, what came of it.
var misuses = []misuse{
	{name: "nothing", do: nothing},
	{name: "sends headers a byte a second, on 1,000 connections", do: slowloris},
	{name: "opens 10,000 connections and says nothing", do: silence},
	{name: "asks 5,000 times a second for tokens that are not in memory", do: misses},
	{name: "asks up to 32,000 times a second for its token", do: tokenLoad(1)},
	{name: "the same, ten times before it reads", do: tokenLoad(10)},
	{name: "two pods: heads of 1,300 fields, on 1,200 connections, reads nothing", do: neverReads(testbed.TinyFields(1300))},
	{name: "two pods: heads of 8 KiB, on 1,200 connections, reads nothing", do: neverReads(testbed.LargeHead())},
	{name: "half a request, on 10,400 connections to the metrics and probe ports", do: pages},
	{name: "ten pods: ask for new tokens that do not come, hang up, and come again", do: hangUps, hang: true},
	{name: "dials the node's address up to 10,000 times a second", do: dials(testbed.NodeAddress, 2579)},
	{name: "dials the metadata service up to 10,000 times a second", do: dials("169.254.169.254", 80)},
	{name: "nothing, again", do: nothing},
}

type misuse struct {
	name string
	do   func(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string
	hang bool // IMDS gives no tokens meanwhile
}

const badPods = 10

func nothing(ctx context.Context, _ []*testbed.Namespace, started chan<- struct{}) string {
	close(started)
	<-ctx.Done()
	return ""
}

// neverReads sends requests on connections of both pods, and reads no answer.
func neverReads(text string) func(context.Context, []*testbed.Namespace, chan<- struct{}) string {
	return func(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
		var floods []*testbed.Flood
		for _, pod := range pods[:2] {
			floods = append(floods, pod.StartFlood(ctx, 600, text))
		}
		pause(ctx, time.Second)
		close(started)
		<-ctx.Done()
		var opened, closed int64
		for _, f := range floods {
			f.Stop()
			opened, closed = opened+f.Opened.Load(), closed+f.Closed.Load()
		}
		return fmt.Sprintf("%d connections, %d of them closed on it", opened, closed)
	}
}

// tokenLoad asks on as many connections as a pod may have, on each so many times before it
// reads the answers.
func tokenLoad(batch int) func(context.Context, []*testbed.Namespace, chan<- struct{}) string {
	return func(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
		const workers, perSecond = 64, 32_000
		path := strings.TrimPrefix(tokenURL, "http://"+testbed.MetadataAddress)
		requests := strings.Repeat("GET "+path+" HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n", batch)
		var answered atomic.Int64
		var running sync.WaitGroup
		for range workers {
			running.Go(func() {
				conn := dial(ctx, pods[0], testbed.MetadataAddress)
				if conn == nil {
					return
				}
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
				answers := bufio.NewReaderSize(conn, 64<<10)
				tick := time.NewTicker(time.Second * workers * time.Duration(batch) / perSecond)
				defer tick.Stop()
				for {
					select {
					case <-tick.C:
					case <-ctx.Done():
						return
					}
					if _, err := io.WriteString(conn, requests); err != nil {
						return
					}
					for range batch {
						if skipAnswer(answers) != nil {
							return
						}
						answered.Add(1)
					}
				}
			})
		}
		began := time.Now()
		close(started)
		<-ctx.Done()
		rate := float64(answered.Load()) / time.Since(began).Seconds()
		running.Wait()
		return fmt.Sprintf("%.0f answers/s", rate)
	}
}

// skipAnswer reads an answer that has a Content-Length, without looking at the rest.
func skipAnswer(r *bufio.Reader) error {
	length := 0
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if name, value, ok := strings.Cut(string(line), ":"); ok && name == "Content-Length" {
			length, _ = strconv.Atoi(strings.TrimSpace(value))
		}
		if len(line) <= 2 {
			_, err := r.Discard(length)
			return err
		}
	}
}

// pages sends half a request on each of many connections to the ports of metrics and
// probes, and opens another for each that is closed.
func pages(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
	const connections = 10_400
	var opened, held atomic.Int64
	var running sync.WaitGroup
	for i := range connections {
		running.Go(func() {
			for ctx.Err() == nil {
				conn := dial(ctx, pods[0], []string{metricsAddress, probeAddress}[i%2])
				if conn == nil {
					continue
				}
				opened.Add(1)
				held.Add(1)
				_, err := io.WriteString(conn, "GET / HTTP/1.1\r\nX: "+strings.Repeat("x", 4000))
				if err == nil {
					stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
					_, _ = conn.Read(make([]byte, 1))
					stop()
				}
				held.Add(-1)
				_ = conn.Close()
				pause(ctx, 100*time.Millisecond)
			}
		})
	}
	pause(ctx, 2*time.Second)
	close(started)
	<-ctx.Done()
	result := fmt.Sprintf("%d connections, %d open at the end", opened.Load(), held.Load())
	running.Wait()
	return result
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// slowloris keeps a thousand connections busy with the header of a request that never
// ends, and opens another for each that is closed.
func slowloris(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
	var opened, closed atomic.Int64
	var running sync.WaitGroup
	for range 1000 {
		running.Go(func() {
			for ctx.Err() == nil {
				if conn := dial(ctx, pods[0], testbed.MetadataAddress); conn != nil {
					opened.Add(1)
					trickle(ctx, conn)
					closed.Add(1)
					_ = conn.Close()
				}
			}
		})
	}
	await(ctx, func() bool { return opened.Load() >= 1000 })
	close(started)
	running.Wait()
	return fmt.Sprintf("%d connections, %d of them closed on it", opened.Load(), closed.Load())
}

// dialling keeps the threads that are in the pod's namespace few.
var dialling = make(chan struct{}, 8)

// dial opens a connection, or waits a moment before the next try.
func dial(ctx context.Context, pod *testbed.Namespace, address string) net.Conn {
	dialling <- struct{}{}
	conn, err := pod.DialContext(ctx, "tcp", address)
	<-dialling
	if err == nil {
		return conn
	}
	pause(ctx, 100*time.Millisecond)
	return nil
}

// trickle sends a byte a second until the other side has had enough.
func trickle(ctx context.Context, conn net.Conn) {
	if _, err := io.WriteString(conn, "GET /metadata/versions HTTP/1.1\r\nX-A: "); err != nil {
		return
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if _, err := io.WriteString(conn, "a"); err != nil {
			return
		}
	}
}

// silence opens connections and holds them.
func silence(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
	var opened atomic.Int64
	var running sync.WaitGroup
	for range 16 {
		running.Go(func() {
			var held []net.Conn
			for range 10_000 / 16 {
				if conn := dial(ctx, pods[0], testbed.MetadataAddress); conn != nil {
					opened.Add(1)
					held = append(held, conn)
				}
			}
			<-ctx.Done()
			for _, conn := range held {
				_ = conn.Close()
			}
		})
	}
	await(ctx, func() bool { return opened.Load() >= 9_900 })
	close(started)
	running.Wait()
	return fmt.Sprintf("%d connections opened", opened.Load())
}

// misses asks for a resource of its own making each time, without an http.Client: what
// the clients need of their core should not hide what the agent does on its own.
func misses(ctx context.Context, pods []*testbed.Namespace, started chan<- struct{}) string {
	// Of the workers 20 always wait, since a pod may have as many fetches under way.
	const workers, waiting, perSecond = 100, 20, 5_000
	var asked, served, refused atomic.Int64
	var running sync.WaitGroup
	for i := range workers {
		running.Go(func() {
			conn := dial(ctx, pods[0], testbed.MetadataAddress)
			if conn == nil {
				return
			}
			defer conn.Close()
			answers := bufio.NewReader(conn)
			tick := time.NewTicker(time.Second * (workers - waiting) / perSecond)
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
				status, err := missOn(conn, answers, i, n)
				if err != nil {
					return
				}
				asked.Add(1)
				switch status {
				case 200:
					served.Add(1)
				case 429:
					refused.Add(1)
				}
			}
		})
	}
	began := time.Now()
	close(started)
	<-ctx.Done()
	rate := float64(asked.Load()) / time.Since(began).Seconds()
	running.Wait()
	return fmt.Sprintf("%.0f requests/s: %d tokens, %d times 429", rate, served.Load(), refused.Load())
}

// missOn asks over an open connection for a token that nobody has asked for.
func missOn(conn net.Conn, answers *bufio.Reader, worker, n int) (status int, err error) {
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second)) // whatever it fails for, the next line will
	target := strings.TrimPrefix(tokenURL, "http://"+testbed.MetadataAddress)
	if _, err := fmt.Fprintf(conn, "GET %s/%d/%d HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n", target, worker, n); err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(answers, nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

// await looks until it is so, for 30 seconds at most.
func await(ctx context.Context, so func() bool) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !so() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
