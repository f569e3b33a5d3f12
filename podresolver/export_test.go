package podresolver

// For the tests of what a caller sees.
const (
	LookupRate    = lookupRate
	LookupBurst   = lookupBurst
	LookupTimeout = lookupTimeout
)

var (
	LastRetry    = retryBackoff.Cap
	NewIdentity  = identity
	GUID         = guid
	Path         = path
	NewBinding   = binding
	NewException = exception
	NewAssigned  = assigned
	NewPod       = newPod
)

// Waiting counts the requests that wait, and the addresses that they wait for.
func (r *Resolver) Waiting() (requests, addresses int) {
	r.waiters.mu.Lock()
	defer r.waiters.mu.Unlock()
	for _, w := range r.waiters.byAddr {
		requests += w.requests
	}
	return requests, len(r.waiters.byAddr)
}
