package proxy

import (
	"net/http"
	"sync"
	"time"

	"github.com/podidentity/nmi/proxy/histogram"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// Stats is what the server has done so far.
type Stats struct {
	Requests    []RequestStats    // those that there were, in any order
	FastPath    uint64            // requests among them that were answered without http.Server
	Refused     map[string]uint64 // requests among them that were not served, by Reason; what Refusals has
	Connections listener.Stats
}

// RequestStats are the requests that have all of this in common, and how long they took until
// the response was written. Those that http.Server answers itself, because it cannot parse
// them, are not counted.
type RequestStats struct {
	Method string // GET or POST; OtherMethod for others
	Route  string // "" for a path that is not served
	Status int    // of the response; 0 without one
	Source string // of the token, as tokencache.Source names it; "" without one
	// Overflow means that these are requests of any kind: there were too many kinds.
	Overflow bool
	Duration histogram.Snapshot
}

// OtherMethod is RequestStats.Method for methods other than GET and POST, as OpenTelemetry's
// semantic conventions for HTTP have it.
const OtherMethod = "_OTHER"

// MaxKinds is how many RequestStats there are at most.
const MaxKinds = maxTokenKinds + maxOtherKinds + 2

const (
	// maxTokenKinds and maxOtherKinds bound the kinds of requests that are told apart, of GETs of
	// the token path, and apart from them, so that no pod can hide their failures, of others: pods
	// choose method and path, and each kind is 3 KiB of /metrics.
	maxTokenKinds = 10
	maxOtherKinds = 8
)

// requestKey is a kind of requests.
type requestKey struct {
	method, route string
	status        int
	source        string
	overflow      bool
}

// requests are the server's requests so far.
type requests struct {
	// hits are those of the fast path, by source: all have a token from memory.
	hits [tokencache.Refreshing + 1]histogram.Histogram

	mu            sync.Mutex // guards the maps, for the others
	token, others map[requestKey]*histogram.Histogram
}

// recordHit counts a request of the fast path.
func (s *requests) recordHit(source tokencache.Source, took time.Duration) {
	s.hits[source].Record(took)
}

// record counts another request.
func (s *requests) record(key requestKey, took time.Duration) {
	s.kind(key).Record(took)
}

func (s *requests) kind(key requestKey) *histogram.Histogram {
	s.mu.Lock()
	defer s.mu.Unlock()
	kinds, most := &s.others, maxOtherKinds
	if key.method == http.MethodGet && key.route == tokenPath {
		kinds, most = &s.token, maxTokenKinds
	}
	if *kinds == nil {
		*kinds = make(map[requestKey]*histogram.Histogram)
	}
	if (*kinds)[key] == nil && len(*kinds) >= most {
		key = requestKey{overflow: true}
	}
	if (*kinds)[key] == nil {
		(*kinds)[key] = new(histogram.Histogram)
	}
	return (*kinds)[key]
}

// Stats returns the counts so far.
func (s *Server) Stats() Stats {
	stats := Stats{Connections: s.conns.Stats(), Refused: s.refusals.counts()}
	all := make(map[requestKey]histogram.Snapshot)
	for source := range s.requests.hits {
		if hits := s.requests.hits[source].Snapshot(); hits.Count() > 0 {
			stats.FastPath += hits.Count()
			all[requestKey{method: http.MethodGet, route: tokenPath, status: http.StatusOK, source: tokencache.Source(source).String()}] = hits
		}
	}
	s.requests.mu.Lock()
	defer s.requests.mu.Unlock()
	for _, kinds := range []map[requestKey]*histogram.Histogram{s.requests.token, s.requests.others} {
		for key, kind := range kinds {
			all[key] = all[key].Add(kind.Snapshot())
		}
	}
	for key, duration := range all {
		stats.Requests = append(stats.Requests, RequestStats{key.method, key.route, key.status, key.source, key.overflow, duration})
	}
	return stats
}

func methodName(method string) string {
	if method == http.MethodGet || method == http.MethodPost {
		return method
	}
	return OtherMethod
}

// tokenPath is where pods request tokens.
const tokenPath = "/metadata/identity/oauth2/token"

// routeName returns the path that a request was routed to, or the first part of it; "" for one
// that is not served.
func routeName(r *http.Request) string {
	if listener.FromContext(r.Context()).Loopback() {
		if isHostTokenPath(r) {
			return hostTokenPath
		}
		return ""
	}
	switch route(r.RequestURI) {
	case routeToken:
		return tokenPath
	case routeInstance:
		return "/metadata/instance"
	case routePublic:
		return pathOf(r)
	case routeSensitive:
		return sensitive(pathOf(r))
	default:
		return ""
	}
}
