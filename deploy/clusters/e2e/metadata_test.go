//go:build cluster

package e2e

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestInstanceMetadata(t *testing.T) {
	s := begin(t, "Instance metadata is passed through to pods, and with nmi.blockInstanceMetadata to excepted ones alone.", theIMDS)
	s.except("monitoring", "app", "monitoring")
	excepted := map[string]string{"app": "monitoring"}
	const instance, attested = "/metadata/instance?api-version=2021-02-01", "/metadata/attested/document?api-version=2021-02-01"
	s.start(
		pod{name: "any", askers: []asker{asks(request{instance, 200, ""}, request{attested, 404, ""})}},
		pod{name: "excepted", labels: excepted, askers: []asker{asks(request{instance, 200, ""}, request{attested, 200, ""})}},
	)
	s.finish()

	s.upgrade("nmi.blockInstanceMetadata=true")
	s.start(
		pod{name: "blocked", askers: []asker{asks(request{instance, 403, ""})}},
		pod{name: "still-excepted", labels: excepted, askers: []asker{asks(request{instance, 200, ""})}},
	)
	s.finish()
}

func TestRetryAfter(t *testing.T) {
	s := begin(t, "When IMDS throttles the node, pods are told when to ask again, IMDS is left alone until then, and tokens in memory are served.", theIMDS)
	const seconds, header = 15 * time.Second, "15"
	s.bind("cart", cart)
	s.start(pod{name: "early", binding: "cart", askers: []asker{asks(s.token(cart))}}) // this token is in memory from here on
	s.finish()

	other := request{tokenPath("https://other." + s.namespace), 200, cart.ClientID}
	throttled := other
	throttled.status, throttled.subject = http.StatusTooManyRequests, ""
	require.NoError(t, world.imds.Inject(t.Context(), imdstest.Fault{Status: http.StatusTooManyRequests, RetryAfter: header, Body: `{"error":"too many"}`}))
	s.start(pod{name: "throttled", binding: "cart", askers: []asker{asks(throttled)}})
	s.finish()
	got, _ := s.answers("throttled", "ask-0")
	require.Len(t, got, 1)
	assert.NotEmpty(t, got[0].RetryAfter)

	again := asks(other)
	again.retry = true
	s.start(
		pod{name: "again", binding: "cart", askers: []asker{again}},
		pod{name: "in-memory", binding: "cart", askers: []asker{{requests: []request{s.token(cart)}, n: 20, every: 50 * time.Millisecond}}},
	)
	s.finish()
	var times []time.Time
	for _, call := range s.imds().Calls {
		if strings.Contains(call.Target, "other") {
			times = append(times, call.Time)
		}
	}
	require.Len(t, times, 2, "the one that was throttled, and the one after the pause")
	assert.GreaterOrEqual(t, times[1].Sub(times[0]), seconds-time.Second, "the agent keeps to Retry-After, in whole seconds")
	s.note("IMDS said Retry-After: %s, and was asked again after %.1f s", header, times[1].Sub(times[0]).Seconds())
}
