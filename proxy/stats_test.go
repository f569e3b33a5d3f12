package proxy

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
)

// kindsOf returns how many requests there were of each kind.
func kindsOf(s Stats) map[string]uint64 {
	counts := make(map[string]uint64)
	for _, r := range s.Requests {
		counts[strings.TrimSpace(fmt.Sprintf("%s %s %d %s", r.Method, r.Route, r.Status, r.Source))] += r.Duration.Count()
	}
	return counts
}

func TestStats(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Allow = []string{thim} })
	w.get(bound, tokenURL)
	w.get(bound, tokenURL)
	w.get(unbound, tokenURL)
	w.imds.Inject(imdstest.Fault{Status: 429})
	w.get(bound, tokenURL+"other")
	w.send(bound, request("POST", tokenURL, "Metadata: true"))
	w.send(bound, request("PUT", tokenURL, "Metadata: true"))
	w.get(bound, "/metadata/instance/compute?api-version=2018-02-01")
	w.get(bound, "/metadata/versions")
	w.get(bound, "/metadata/THIM/amd/certification?api-version=x")
	w.get(bound, "/metadata/identity/oauth2/token/../../x")
	w.get(bound, "/other")
	want := map[string]uint64{
		"GET /metadata/identity/oauth2/token 200 upstream": 1,
		"GET /metadata/identity/oauth2/token 200 memory":   1,
		"GET /metadata/identity/oauth2/token 400":          1,
		"GET /metadata/identity/oauth2/token 429":          1,
		"POST /metadata/identity/oauth2/token 405":         1,
		"_OTHER /metadata/identity/oauth2/token 405":       1,
		"GET /metadata/instance 200":                       1,
		"GET /metadata/versions 200":                       1,
		"GET /metadata/THIM 200":                           1,
		"GET  404":                                         2,
	}
	w.eventually(func() bool { return assert.ObjectsAreEqual(want, kindsOf(w.server.Stats())) }, "counted once the response is written: %v", kindsOf(w.server.Stats()))
	for _, r := range w.server.Stats().Requests {
		assert.Positive(t, r.Duration.Sum)
	}
}

func TestStatsOfTheFastPath(t *testing.T) {
	w := newWorld(t, nil)
	c := w.connect(bound)
	for i := range 5 {
		resp, _ := c.exchange(t, withID(i))
		require.Equal(t, http.StatusOK, resp.StatusCode)
	}
	want := map[string]uint64{
		"GET /metadata/identity/oauth2/token 200 upstream": 1,
		"GET /metadata/identity/oauth2/token 200 memory":   4,
	}
	w.eventually(func() bool { return assert.ObjectsAreEqual(want, kindsOf(w.server.Stats())) }, "%v", kindsOf(w.server.Stats()))
	assert.Equal(t, uint64(3), w.server.Stats().FastPath, "once the head is known, and the connection taken back")
}

// What a pod can choose makes no more series than that.
func TestKindsAreBounded(t *testing.T) {
	var all requests
	for status := range 1000 {
		all.record(requestKey{method: OtherMethod, status: status}, time.Second)
	}
	assert.Len(t, all.others, maxOtherKinds+1)
	assert.Equal(t, uint64(1000-maxOtherKinds), all.others[requestKey{overflow: true}].Snapshot().Count())
	token := requestKey{method: http.MethodGet, route: tokenPath, status: http.StatusServiceUnavailable}
	all.record(token, time.Second)
	assert.Equal(t, uint64(1), all.token[token].Snapshot().Count(), "still told apart")
}
