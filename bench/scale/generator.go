package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
)

// The load generator is a process of its own, on a core of its own. It gets the pods'
// namespaces as its first files, a load as the first line of its input, opens all connections,
// writes a line, and begins at the next line of its input.

const firstFile = 3 // os/exec.Cmd.ExtraFiles

// load is what the pods ask for. Each connection is kept alive, and has asked once before the
// measurement.
type load struct {
	Pods   []podLoad
	Rate   float64       // requests a second in all, sent on time whatever the answers take; 0 is as many as possible
	Length time.Duration // 0 is one request on each active connection, all at once
}

type podLoad struct {
	Active, Idle int      // connections
	Warm         string   // URL that each asks for once
	URLs         []string // that active ones ask for
}

// result is what the pods saw.
type result struct {
	Requests, Failed, Throttled int // Failed have neither 200 nor 429
	Seconds                     float64
	P50, P99, Max               time.Duration
	Error                       string // of the first that failed
}

// generate is the process.
func generate(ctx context.Context) error {
	in := bufio.NewReader(os.Stdin)
	var l load
	line, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, &l); err != nil {
		return err
	}
	conns, err := connect(ctx, l)
	if err != nil {
		return err
	}
	fmt.Println("connected")
	if _, err := in.ReadBytes('\n'); errors.Is(err, io.EOF) {
		return nil // the connections were all that was wanted
	} else if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(ask(ctx, l, conns))
}

// conn is a connection of a pod. It is opened anew when the server has closed it.
type conn struct {
	pod    *testbed.Namespace
	urls   []string
	net    net.Conn
	in     *bufio.Reader
	took   []time.Duration
	result result
}

// connect opens the connections; it returns the active ones.
func connect(ctx context.Context, l load) (active []*conn, err error) {
	var connecting sync.WaitGroup
	var failed error
	var once sync.Once
	atOnce := make(chan struct{}, 64)
	for i, p := range l.Pods {
		ns := testbed.NamespaceOf(firstFile + i)
		for n := range p.Active + p.Idle {
			c := &conn{pod: ns, urls: p.URLs}
			if n < p.Active {
				active = append(active, c)
			}
			atOnce <- struct{}{}
			connecting.Go(func() {
				defer func() { <-atOnce }()
				if err := c.warm(ctx, p.Warm); err != nil {
					once.Do(func() { failed = fmt.Errorf("warming up: %w", err) })
				}
			})
		}
	}
	connecting.Wait()
	return active, failed
}

// warm asks once; this is not measured yet, so that it may be tried again.
func (c *conn) warm(ctx context.Context, url string) (err error) {
	for range 5 {
		var status int
		if status, err = c.get(ctx, url); err == nil && status == 200 {
			return nil
		}
		if err == nil {
			err = fmt.Errorf("status %d", status)
		}
	}
	return err
}

// ask runs the load.
func ask(ctx context.Context, l load, conns []*conn) (sum result) {
	var asking sync.WaitGroup
	began := time.Now()
	for i, c := range conns {
		asking.Go(func() {
			if l.Length == 0 {
				c.ask(ctx, began)
				return
			}
			if l.Rate == 0 {
				for now := time.Now(); now.Sub(began) < l.Length && ctx.Err() == nil; now = time.Now() {
					c.ask(ctx, now)
				}
				return
			}
			every := time.Duration(float64(len(conns)) / l.Rate * float64(time.Second))
			for at := began.Add(every * time.Duration(i) / time.Duration(len(conns))); at.Sub(began) < l.Length && ctx.Err() == nil; at = at.Add(every) {
				time.Sleep(time.Until(at))
				c.ask(ctx, at)
			}
		})
	}
	asking.Wait()
	sum.Seconds = time.Since(began).Seconds()
	var took []time.Duration
	for _, c := range conns {
		sum.Requests += c.result.Requests
		sum.Failed += c.result.Failed
		sum.Throttled += c.result.Throttled
		if sum.Error == "" {
			sum.Error = c.result.Error
		}
		took = append(took, c.took...)
	}
	sum.P50, sum.P99, sum.Max = measure.Median(took), measure.Quantile(took, 0.99), measure.Quantile(took, 1)
	return sum
}

// ask sends one request that was to be sent at a time.
func (c *conn) ask(ctx context.Context, at time.Time) {
	status, err := c.get(ctx, c.urls[rand.N(len(c.urls))])
	c.took = append(c.took, time.Since(at))
	c.result.Requests++
	switch {
	case err != nil:
		c.result.Failed++
		c.result.Error = err.Error()
	case status == 429:
		c.result.Throttled++
	case status != 200:
		c.result.Failed++
		c.result.Error = fmt.Sprintf("status %d", status)
	}
}

const patience = 40 * time.Second // for one answer

// get repeats nothing: a connection that ends where an answer is due is an error.
func (c *conn) get(ctx context.Context, url string) (status int, err error) {
	defer func() {
		if err != nil && c.net != nil {
			_ = c.net.Close()
			c.net = nil
		}
	}()
	if c.net == nil {
		if c.net, err = c.pod.DialContext(ctx, "tcp", testbed.MetadataAddress); err != nil {
			c.net = nil
			return 0, err
		}
		c.in = bufio.NewReaderSize(c.net, 2048)
	}
	_ = c.net.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c.net, "GET "+url+" HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n"); err != nil {
		return 0, err
	}
	length, closes := 0, false
	for n := 0; ; n++ {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		line = bytes.TrimSpace(line)
		value, isLength := bytes.CutPrefix(line, []byte("Content-Length: "))
		switch {
		case n == 0:
			if len(line) < len("HTTP/1.1 200") {
				return 0, errors.New("malformed response")
			}
			status, err = strconv.Atoi(string(line[9:12]))
		case isLength:
			length, err = strconv.Atoi(string(value))
		case string(line) == "Connection: close":
			closes = true
		}
		if err != nil {
			return 0, fmt.Errorf("malformed response: %w", err)
		}
		if len(line) == 0 {
			break
		}
	}
	if _, err := c.in.Discard(length); err != nil {
		return 0, err
	}
	if closes {
		_ = c.net.Close()
		c.net = nil
	}
	return status, nil
}
