package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
)

// misuses are what the bad pod does. do closes started when it is at its worst, and
// returns, when ctx ends, what it got from it.
var misuses = []struct {
	name string
	do   func(ctx context.Context, pod *testbed.Pod, started chan<- struct{}) string
}{
	{"nothing", nothing},
	{"sends headers a byte a second, on 1,000 connections", slowloris},
	{"opens 10,000 connections and says nothing", silence},
	{"asks 5,000 times a second for tokens that are not in memory", misses},
	{"nothing, again", nothing},
}

func nothing(ctx context.Context, _ *testbed.Pod, started chan<- struct{}) string {
	close(started)
	<-ctx.Done()
	return ""
}

// slowloris keeps a thousand connections busy with the header of a request that never
// ends, and opens another for each that is closed.
func slowloris(ctx context.Context, pod *testbed.Pod, started chan<- struct{}) string {
	var opened, closed atomic.Int64
	var running sync.WaitGroup
	for range 1000 {
		running.Go(func() {
			for ctx.Err() == nil {
				if conn := dial(ctx, pod); conn != nil {
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
func dial(ctx context.Context, pod *testbed.Pod) net.Conn {
	dialling <- struct{}{}
	conn, err := pod.DialContext(ctx, "tcp", testbed.MetadataAddress)
	<-dialling
	if err == nil {
		return conn
	}
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
	}
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
func silence(ctx context.Context, pod *testbed.Pod, started chan<- struct{}) string {
	var opened atomic.Int64
	var running sync.WaitGroup
	for range 16 {
		running.Go(func() {
			var held []net.Conn
			for range 10_000 / 16 {
				if conn := dial(ctx, pod); conn != nil {
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

// misses asks for a resource of its own making each time.
func misses(ctx context.Context, pod *testbed.Pod, started chan<- struct{}) string {
	const workers, perSecond = 50, 5_000
	var asked, served, refused atomic.Int64
	var running sync.WaitGroup
	for i := range workers {
		running.Go(func() {
			client := pod.Client(30 * time.Second)
			defer client.CloseIdleConnections()
			tick := time.NewTicker(time.Second * workers / perSecond)
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
				status, err := get(ctx, client, fmt.Sprintf("%s/%d/%d", tokenURL, i, n))
				if err != nil {
					continue
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
	running.Wait()
	return fmt.Sprintf("%.0f requests/s, %d tokens, the rest 429 (%d)", float64(asked.Load())/time.Since(began).Seconds(), served.Load(), refused.Load())
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
