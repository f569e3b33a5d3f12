package podresolver

// For tests in package podresolver_test.
const (
	LookupRate    = lookupRate
	LookupBurst   = lookupBurst
	LookupTimeout = lookupTimeout
	MaxLookedUp   = maxLookedUp
)

// LastRetry is the longest pause between two tries.
var LastRetry = retryBackoff.Cap

// Waiting returns the number of waiting requests, and of the addresses they wait for.
func (r *Resolver) Waiting() (requests, addresses int) {
	r.waiters.mu.Lock()
	defer r.waiters.mu.Unlock()
	for _, w := range r.waiters.byAddr {
		requests += w.requests
	}
	return requests, len(r.waiters.byAddr)
}
