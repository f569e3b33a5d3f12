package podresolver

// For tests in package podresolver_test.
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

// Waiting returns the number of waiting requests, and of the addresses they wait for.
func (r *Resolver) Waiting() (requests, addresses int) {
	r.waiters.mu.Lock()
	defer r.waiters.mu.Unlock()
	for _, w := range r.waiters.byAddr {
		requests += w.requests
	}
	return requests, len(r.waiters.byAddr)
}
