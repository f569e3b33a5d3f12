package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
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

// misses asks for a resource of its own making each time, without an http.Client: what
// the clients need of their core should not hide what the agent does on its own.
func misses(ctx context.Context, pod *testbed.Pod, started chan<- struct{}) string {
	// Of the workers 20 always wait, since a pod may have as many fetches under way.
	const workers, waiting, perSecond = 100, 20, 5_000
	var asked, served, refused atomic.Int64
	var running sync.WaitGroup
	for i := range workers {
		running.Go(func() {
			conn := dial(ctx, pod)
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
