//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// lateness is how long after the clients began their identity is assigned.
const lateness = 3 * time.Second

// Azure's SDKs, in pods, through each redirect.
func TestClients(t *testing.T) {
	var reports []*clientReport
	for _, redirect := range redirects {
		t.Run(redirect, func(t *testing.T) {
			results := newClientReport(redirect)
			reports = append(reports, results)
			beginWith(t, redirect).runsClients(results)
		})
	}
	if *write {
		require.NoError(t, writeClientReports(reports))
	}
}

func (s *scenario) runsClients(results *clientReport) {
	s.t.Helper()
	doc, err := os.ReadFile("../../docs/troubleshooting.md")
	require.NoError(s.t, err)
	agent := s.agent()
	for i, c := range clients {
		s.t.Run(c.String(), func(t *testing.T) {
			// Pods of its own: of each the agent logs no more than some refusals, and when
			// they are gone it does not refresh their tokens while the next client is at it.
			s := s.within(t)
			p := s.pod(fmt.Sprint("cart-", i), fmt.Sprint("10.244.0.", 100+2*i), testbed.Ptp, "cart")
			nobody := s.pod(fmt.Sprint("nobody-", i), fmt.Sprint("10.244.0.", 101+2*i), testbed.Ptp, "nothing")
			// What the API server lists may be a moment old. From here on it is known.
			p.hears(vault, cart.ClientID)
			on := clientIn{p, c, t, results, agent}
			on.getsTokens()
			told := on.isRefused(columnOther, job{By: "client", ID: report.ClientID})
			assert.Contains(t, told, c.says)
			assert.Contains(t, string(doc), c.says)
			clientIn{nobody, c, t, results, agent}.isRefused(columnNone, job{})
			on.isThrottledOnce()
			on.getsATokenThatEndsSoon()
		})
	}
	s.t.Run("identity assigned later", func(t *testing.T) {
		s := s.within(t)
		s.identity("shop", "standard", cart)
		s.binding("shop", "standard", "standard", "standard")
		standard := s.successor("--operation-mode=standard")
		s.stops(agent)
		p := s.pod("late-0", "10.244.2.1", testbed.Ptp, "standard")
		require.Eventually(t, func() bool { return p.probes().status == 0 }, patience, time.Millisecond,
			"the binding is known, and the request held")
		s.areAssignedLater(results, columnWaits, 10)
		s.successor("--operation-mode=standard", "--identity-wait=1s")
		s.stops(standard)
		s.areAssignedLater(results, columnReturns, 20)
	})
}

// getsTokens is the main job: a token from upstream, one from the SDK's memory,
// and, for another process, one from the agent's; then by each kind of ID.
func (c clientIn) getsTokens() {
	c.t.Helper()
	resource := c.unused()
	both := c.run(job{Resource: resource, Times: 2})
	c.got(both[0], columnFirst, cart)
	c.got(both[1], columnSecond, cart)
	c.got(c.run(job{Resource: resource, Times: 1})[0], columnAgain, cart)
	for _, by := range c.by {
		refused := c.refusals()
		r := c.run(job{Resource: resource, Times: 1, By: by, ID: map[string]string{
			"client": cart.ClientID, "resource": cart.ResourceID, "object": cart.ObjectID,
		}[by]})[0]
		c.results.byID(c.client, by, r)
		if by == "object" && r.Error != "" { // an AzureIdentity does not say its object ID
			c.gaveUp(r, refused)
			continue
		}
		assert.Equal(c.t, cart.ClientID, r.Subject, "by %s ID: %s", by, r.Error)
	}
}

// isRefused asserts that the client is told at once, and why, and returns what it says.
func (c clientIn) isRefused(what string, j job) string {
	c.t.Helper()
	j.Resource, j.Times = vault, 1
	refused := c.refusals()
	r := c.run(j)[0]
	assert.Empty(c.t, r.Subject, what)
	assert.Contains(c.t, r.Error, "Identity not found", what)
	c.gaveUp(r, refused)
	c.results.refused(c.client, what, r)
	return r.Error
}

// refusals counts what the agent has said of requests of this pod that it refused.
func (c clientIn) refusals() (count int) {
	for line := range strings.Lines(c.agent.Log()) {
		if strings.Contains(line, `msg="not served"`) && strings.Contains(line, " pod=shop/"+c.pod.name+" ") {
			count++
		}
	}
	return count
}

// gaveUp asserts that the client, which was told that its identity is the wrong one, did
// not ask again: the pauses before that are what a person would wait for.
func (c clientIn) gaveUp(r outcome, before int) {
	c.t.Helper()
	require.Eventually(c.t, func() bool { return c.refusals() > before }, patience, 2*time.Millisecond)
	assert.Equal(c.t, before+1, c.refusals(), r.Error)
	assert.Less(c.t, r.took(), patience, r.Error)
}

func (c clientIn) isThrottledOnce() {
	c.t.Helper()
	world.IMDS.Inject(imdstest.Fault{Status: 429, RetryAfter: "1", Body: `{"error":"invalid_request","error_description":"Temporarily throttled, too many requests"}`})
	resource := c.unused()
	r := c.run(job{Resource: resource, Times: 1})[0]
	c.got(r, columnThrottled, cart)
	var statuses []int
	for _, call := range world.IMDS.Calls() {
		if strings.Contains(call.Target, url.QueryEscape(resource)) {
			statuses = append(statuses, call.Status)
		}
	}
	assert.Equal(c.t, []int{429, 200}, statuses, "it was throttled, and asked again")
}

// getsATokenThatEndsSoon gives the client a token that every SDK takes for one to
// be replaced: it asks again, and the agent has no other yet.
func (c clientIn) getsATokenThatEndsSoon() {
	c.t.Helper()
	resource := c.unused()
	world.IMDS.Inject(imdstest.Fault{Status: 200, Body: c.shortLived(cart, resource, 3*time.Minute)})
	for i, r := range c.run(job{Resource: resource, Times: 2}) {
		c.got(r, []string{columnEnds, columnEndsAgain}[i], cart)
		assert.InDelta(c.t, 2.5, r.Minutes, 0.6) // some time after it was made
	}
}

// shortLived is IMDS's answer with a token of an unusually short life.
func (c clientIn) shortLived(id imdstest.Identity, resource string, life time.Duration) string {
	c.t.Helper()
	fake := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{id}, Lifetime: life})
	srv := fake.Start()
	defer srv.Close()
	client := srv.Client()
	got := ask(c.t, client, srv.URL+"/metadata/identity/oauth2/token?api-version=2018-02-01&resource="+resource+"&client_id="+id.ClientID)
	require.Equal(c.t, 200, got.status, got.body)
	return got.body
}

// areAssignedLater has a pod for each client, all of which begin before MIC has
// assigned their identity.
func (s *scenario) areAssignedLater(results *clientReport, column string, addresses int) {
	s.t.Helper()
	var asking sync.WaitGroup
	heard := make([][]outcome, len(clients))
	for i, c := range clients {
		name := fmt.Sprintf("late-%d", addresses+i)
		on := clientIn{s.pod(name, "10.244.2."+strconv.Itoa(addresses+i), testbed.Ptp, "standard"), c, s.t, results, nil}
		resource := on.unused()
		asking.Go(func() { heard[i] = on.run(job{Resource: resource, Times: 1}) })
	}
	time.Sleep(lateness) // what this is about, not a wait for something
	for i := range clients {
		name := fmt.Sprintf("late-%d", addresses+i)
		s.assignment(name, name, "Assigned", cart)
	}
	asking.Wait()
	for i, c := range clients {
		s.t.Run(column+", "+c.String(), func(t *testing.T) {
			require.Len(t, heard[i], 1)
			clientIn{nil, c, t, results, nil}.got(heard[i][0], column, cart)
		})
	}
}

// got asserts that the client has a token of the identity, and reports the time.
func (c clientIn) got(r outcome, column string, id imdstest.Identity) {
	c.t.Helper()
	assert.Equal(c.t, id.ClientID, r.Subject, "%s: %s", column, r.Error)
	c.results.took(c.client, column, r)
}

// clientsWork is case 48 of the conformance suite: each SDK gets a token.
func (s *scenario) clientsWork() error {
	s.t.Helper()
	p := s.pod("client-0", "10.244.0.83", testbed.Ptp, "cart")
	for _, c := range clients {
		results, err := c.run(p.Pod, job{Resource: vault, Times: 1})
		if err != nil {
			return fmt.Errorf("%s: %w", c, err)
		}
		if len(results) != 1 || results[0].Subject != cart.ClientID {
			text, _ := json.Marshal(results)
			return fmt.Errorf("%s: %s, expected a token", c, text)
		}
	}
	return nil
}
