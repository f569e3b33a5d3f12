package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const (
	patience = 40 * time.Second // for an answer: a fetch waits 18 s for its slot and takes 10 at most
	thinking = 20 * time.Millisecond
	warm     = 8 // resources that all pods ask for
	tokenURL = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="
)

// tally counts answers by their verdicts.
type tally struct {
	counts [verdicts]atomic.Int64
	cold   atomic.Int64 // resources that nobody has asked for before
	// takeovers is odd while an agent takes over from another.
	takeovers atomic.Int64

	mu       sync.Mutex       // guards all below
	first    [verdicts]string // of those that are wrong or lost
	complain func(string)
	firsts   []time.Duration // from a pod's address in the API server to its first token
	unserved []string        // pods that were there for longer than patience, and never got a token
}

func (t *tally) add(v verdict, text string) {
	t.counts[v].Add(1)
	if v != wrong && v != lost {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.first[v] == "" {
		t.first[v] = text
	}
	if t.counts[wrong].Load()+t.counts[lost].Load() <= 20 {
		t.complain(text)
	}
}

// pod is a pod of the node with its clients, which ask from the moment that it has a network.
type pod struct {
	*testbed.Pod
	name, selector string
	entitled       *entitlement
	foreign        []string // client IDs of other selectors' identities

	known  time.Time    // its address was written to the API server; its owner's alone
	served atomic.Int64 // the first token, Unix nanoseconds; 0 for none
	stop   context.CancelFunc
	asking sync.WaitGroup
}

// start begins two clients: one keeps its connection alive, one makes a new one each time.
func (p *pod) start(ctx context.Context, t *tally) {
	ctx, p.stop = context.WithCancel(ctx)
	for _, keepAlive := range []bool{true, false} {
		p.asking.Go(func() {
			c := client{pod: p, keepAlive: keepAlive, given: make(map[string]given)}
			defer c.close()
			for ctx.Err() == nil {
				c.ask(t)
				select {
				case <-time.After(thinking/2 + rand.N(thinking)):
				case <-ctx.Done():
				}
			}
		})
	}
}

// end stops the clients once they have their answers.
func (p *pod) end(t *tally) {
	p.stop()
	p.asking.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	switch served := p.served.Load(); {
	case served != 0:
		t.firsts = append(t.firsts, max(0, time.Unix(0, served).Sub(p.known)))
	case time.Since(p.known) > patience:
		t.unserved = append(t.unserved, p.name)
	}
}

// client repeats nothing: a connection that ends where an answer is due is a loss.
type client struct {
	pod       *pod
	keepAlive bool
	conn      net.Conn
	in        *bufio.Reader
	given     map[string]given // by resource, the last of each
}

// given is a token that a client was given.
type given struct {
	subject        string
	asked, expires time.Time
}

const (
	// aMoment is for how long a token that was given must be there for the next request. The
	// agent keeps the tokens that were used last, and nobody asks for a thousand in that time.
	aMoment = 30 * time.Second
	// nearEnd is before a token's end, when its answers may depend on IMDS.
	nearEnd = 10 * time.Second
)

// lately returns whose token for a resource the client was given a moment ago, if that is
// still good, and what the pod is entitled to has not changed since.
func (c *client) lately(resource string, now time.Time) string {
	last := c.given[resource]
	if now.Sub(last.asked) > aMoment || last.expires.Sub(now) < nearEnd ||
		!slices.Equal(c.pod.entitled.between(last.asked, now), []string{last.subject}) {
		return ""
	}
	return last.subject
}

func (c *client) close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// ask sends one request, and judges the answer.
func (c *client) ask(t *tally) {
	asked := request{resource: fmt.Sprintf("https://warm-%d.example", rand.N(warm))}
	switch n := rand.N(200); {
	case n < 2:
		asked.resource = fmt.Sprintf("https://cold-%d.example", t.cold.Add(1))
	case n < 20:
		asked.foreign = c.pod.foreign[rand.N(len(c.pod.foreign))]
	}
	sent, takeovers := time.Now(), t.takeovers.Load()
	asked.given = c.lately(asked.resource, sent)
	got := c.exchange(asked)
	now := time.Now()
	v, text := judge(asked, got, c.pod.entitled.between(sent, now), now)
	if v == right {
		c.pod.served.CompareAndSwap(0, now.UnixNano())
		if takeovers%2 == 0 && takeovers == t.takeovers.Load() { // else the agent that ends may have fetched it too late to hand it over
			c.given[asked.resource] = given{imdstest.Subject(got.body.Token), sent, time.Unix(got.body.ExpiresOn, 0)}
		}
	}
	t.add(v, fmt.Sprintf("%s at %s, sent %s: %s", c.pod.name, c.pod.Addr, sent.Format("15:04:05.000"), text))
}

func (c *client) exchange(asked request) (got answer) {
	defer func() {
		if got.err != nil || !c.keepAlive {
			c.close()
		}
	}()
	if c.conn == nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if c.conn, got.err = c.pod.DialContext(ctx, "tcp", testbed.MetadataAddress); got.err != nil {
			c.conn = nil
			return got
		}
		c.in = bufio.NewReader(c.conn)
	}
	target := tokenURL + asked.resource
	if asked.foreign != "" {
		target += "&client_id=" + asked.foreign
	}
	if got.err = c.conn.SetDeadline(time.Now().Add(patience)); got.err != nil {
		return got
	}
	if _, got.err = io.WriteString(c.conn, "GET "+target+" HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n"); got.err != nil {
		return got
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		got.err = err
		return got
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		got.err = err
		return got
	}
	got.status, got.retryAfter = resp.StatusCode, resp.Header.Get("Retry-After")
	if resp.StatusCode == http.StatusOK && json.NewDecoder(strings.NewReader(string(text))).Decode(&got.body) != nil {
		got.body = body{} // judged as a token of nobody
	}
	if resp.Close {
		c.close()
	}
	return got
}
