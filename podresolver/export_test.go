package podresolver

// For the tests of what a caller sees.
const (
	LookupRate    = lookupRate
	LookupBurst   = lookupBurst
	LookupTimeout = lookupTimeout
)

var (
	LastRetry    = retryDelay.Cap
	NewIdentity  = identity
	GUID         = guid
	Path         = path
	NewBinding   = binding
	NewException = exception
	NewAssigned  = assigned
	NewPod       = newPod
)

// HoldDecisions keeps a decision from being published until release is called.
func (r *Resolver) HoldDecisions() (release func()) {
	r.waiting.mu.Lock()
	return r.waiting.mu.Unlock
}

// Bindings counts those in the tables.
func (r *Resolver) Bindings() int {
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	return len(r.tables.bindings)
}

// Waiting counts the requests that wait, and the addresses that they wait for.
func (r *Resolver) Waiting() (requests, addresses int) {
	r.waiting.mu.Lock()
	defer r.waiting.mu.Unlock()
	for _, w := range r.waiting.byAddr {
		requests += w.waiting
	}
	return requests, len(r.waiting.byAddr)
}
