// Package podresolver finds out who is calling and what they may use: a source
// address becomes a pod, a pod an identity.
//
// The life of a decision:
//
//  1. Reflectors fill tables with what decisions need, and only that, of this
//     node's pods and of the cluster's identities, bindings and exceptions.
//  2. A change marks the pods that it bears on. One goroutine decides anew for
//     those and publishes a snapshot: address to pod, with the pod's identities in
//     order. A storm of changes is one recomputation.
//  3. Resolve is one atomic load and one map lookup.
//  4. An address that is not known waits, bounded, for its event, since a pod can
//     ask before its status has reached the API server's watchers; then the API
//     server is asked once.
//
// Nothing is answered before every table has been filled: a decision taken without
// the exceptions, say, would be wrong.
package podresolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Mode is who decides which identities a pod may use.
type Mode string

const (
	// Managed decides here, from AzureIdentityBindings of the pod's namespace.
	Managed Mode = "managed"
	// Standard goes by the AzureAssignedIdentities that the MIC controller makes.
	Standard Mode = "standard"
)

// What a Config that leaves them out has.
const (
	DefaultPodWait      = 3 * time.Second
	DefaultIdentityWait = 10 * time.Second
)

// Config says which node's pods to resolve, and how. Node is required.
type Config struct {
	Node string
	Mode Mode // "" means Managed
	// Namespaced keeps identities from pods of other namespaces in Standard mode.
	// In Managed mode they always are.
	Namespaced bool
	// MICNamespace is the namespace of the Deployment "mic", whose pods are excepted in
	// Standard mode; "" excepts none. There is no MIC in Managed mode.
	MICNamespace string
	// ExceptionNamespaces are the namespaces whose AzurePodIdentityExceptions count:
	// nil for all, empty for none.
	ExceptionNamespaces []string
	Deny                DenyList
	// StrictSelection refuses a request that names no identity where the pod has
	// several, as IMDS does, instead of choosing one.
	StrictSelection bool

	PodWait      time.Duration // how long an unknown address waits for its pod; 0 means DefaultPodWait
	IdentityWait time.Duration // how long a request waits for MIC's assignment; 0 means DefaultIdentityWait
	// MaxStaleness is how long decisions are good for, counted from when the API server
	// last sent something of a resource, if only a bookmark. After two thirds of it the
	// resource is listed anew. 0 means for ever.
	MaxStaleness time.Duration
	Logger       *slog.Logger `json:"-"` // nil means slog.Default
}

// Resolver resolves addresses of this node's pods. It is safe for concurrent
// use once Run is called.
type Resolver struct {
	cfg     Config
	tables  *tables
	sources []*source

	current atomic.Pointer[snapshot]
	synced  chan struct{} // closed when the first complete snapshot is published
	expired atomic.Bool   // MaxStaleness has passed
	waiting waiting

	decided map[cache.ObjectName]*Pod // the deciding goroutine's alone

	pods      cache.ListerWatcherWithContext // for lookups
	podRow    func(*corev1.Pod) *podRow
	lookups   singleflight.Group
	limit     *rate.Limiter
	ambiguous atomic.Uint64
	asked     atomic.Uint64
	found     atomic.Uint64
}

// New returns a Resolver that reads from the sources once Run is called.
func New(from Sources, cfg Config) (*Resolver, error) {
	if cfg.Node == "" {
		return nil, errors.New("the node's name is needed to know its pods")
	}
	if cfg.PodWait == 0 {
		cfg.PodWait = DefaultPodWait
	}
	if cfg.IdentityWait == 0 {
		cfg.IdentityWait = DefaultIdentityWait
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	standard := cfg.Mode == Standard
	if !standard {
		cfg.MICNamespace = "" // a pod's author controls all that makes it look like MIC's
	}
	t := newTables(standard && !cfg.Namespaced)
	r := &Resolver{
		cfg: cfg, tables: t, synced: make(chan struct{}), decided: make(map[cache.ObjectName]*Pod),
		pods: cache.ToListerWatcherWithContext(from.Pods), podRow: podRowFor(cfg.Node, cfg.MICNamespace),
		limit: rate.NewLimiter(lookupRate, lookupBurst),
	}
	r.sources = []*source{
		newSource(r, "pods", from.Pods, false, t.pods, r.podRow, t.changedPod),
		newSource(r, aadpodidentity.AzureIdentities.GroupResource().String(), from.Identities, false, t.identities, identityRowOf, t.changedIdentity),
		newSource(r, aadpodidentity.AzureIdentityBindings.GroupResource().String(), from.Bindings, false, t.bindings, bindingRowOf, t.changedBinding),
		newSource(r, aadpodidentity.AzurePodIdentityExceptions.GroupResource().String(), from.Exceptions, true, t.exceptions, exceptionRowOf, t.changedException),
	}
	if standard {
		r.sources = append(r.sources,
			newSource(r, aadpodidentity.AzureAssignedIdentities.GroupResource().String(), from.Assigned, false, t.assigned, assignedRowFor(cfg.Node), t.changedAssigned))
	}
	first, _ := newSnapshot(maps.Values(r.decided), time.Time{})
	r.current.Store(first)
	return r, nil
}

// Read returns a Resolver that knows what there is now, and is not kept up to date: it is
// not for Run, and for Explain. It returns at once where the API server does not tell of
// everything, with the reason and what to do about it.
func Read(ctx context.Context, from Sources, cfg Config) (*Resolver, error) {
	r, err := New(from, cfg)
	if err != nil {
		return nil, err
	}
	var missing []error
	for _, s := range r.sources {
		missing = append(missing, s.fill(ctx))
	}
	if err := errors.Join(missing...); err != nil {
		return nil, err
	}
	r.update()
	close(r.synced)
	return r, nil
}

// Run keeps the snapshots up to date until ctx ends, and returns when all its
// goroutines have.
func (r *Resolver) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, s := range r.sources {
		wg.Go(func() { s.reflector.RunWithContext(ctx) })
	}
	defer wg.Wait()

	for _, s := range r.sources {
		select {
		case <-s.synced:
		case <-ctx.Done():
			return
		}
	}
	expiry := r.update()
	close(r.synced)
	every := quietLimit / 30
	if r.cfg.MaxStaleness > 0 {
		every = min(time.Second, r.cfg.MaxStaleness/10)
	}
	staleness := time.NewTicker(every)
	defer staleness.Stop()
	for {
		select {
		case <-r.tables.wake:
			expiry = r.update()
		case <-expiry:
			expiry = r.update()
		case now := <-staleness.C:
			r.checkStaleness(now)
		case <-ctx.Done():
			return
		}
	}
}

// Resolve returns the pod that holds addr now. An unknown address is waited for
// as long as Config.PodWait and ctx allow, and the API server asked once; then it is
// ErrUnknownAddress, or ErrNotSynced where no address can be known yet. One that several
// live pods claim is ErrAmbiguousAddress at once. ErrStale means that nothing is known for
// certain any more.
func (r *Resolver) Resolve(ctx context.Context, addr netip.Addr) (*Pod, error) {
	return r.ResolveCaller(ctx, addr, func(*Pod) error { return nil })
}

// ResolveCaller is Resolve for a caller that confirm can tell from other pods: a pod for
// which it returns ErrUnconfirmed is as good as unknown, so that its address is waited for
// too. Its last error is returned. confirm may be called several times.
func (r *Resolver) ResolveCaller(ctx context.Context, addr netip.Addr, confirm func(*Pod) error) (*Pod, error) {
	if r.expired.Load() {
		return nil, ErrStale
	}
	s := r.current.Load()
	pod, err := s.resolve(addr, confirm)
	if err == nil || !worthWaiting(err) {
		return pod, err
	}
	return r.await(ctx, addr, s, err, confirm)
}

// worthWaiting reports whether news of an address may be on their way.
func worthWaiting(err error) bool {
	return errors.Is(err, ErrUnknownAddress) || errors.Is(err, ErrUnconfirmed)
}

func (r *Resolver) await(ctx context.Context, addr netip.Addr, s *snapshot, err error, confirm func(*Pod) error) (pod *Pod, _ error) {
	patience, cancel := context.WithTimeout(ctx, r.cfg.PodWait)
	defer cancel()
	for r.waiting.forChange(patience, r.current.Load, addr, s) {
		s = r.current.Load()
		if pod, err = s.resolve(addr, confirm); err == nil || !worthWaiting(err) {
			return pod, err
		}
	}
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case !closed(r.synced):
		return nil, r.notSynced()
	case r.expired.Load():
		return nil, ErrStale
	}
	found, failure := r.lookup(ctx, addr)
	if failure == nil {
		failure = confirm(found)
	}
	switch {
	case failure == nil:
		return found, nil
	case errors.Is(err, ErrUnconfirmed):
		return nil, err // says more than that the API server knows no more than the watch
	}
	return nil, failure
}

// Identity decides which identity a pod that was resolved from addr gets, see
// (*Pod).Identity. One that MIC has yet to assign is waited for as long as
// Config.IdentityWait and ctx allow; then it is ErrNotAssigned.
func (r *Resolver) Identity(ctx context.Context, addr netip.Addr, pod *Pod, want Selector) (Identity, error) {
	id, err := pod.Identity(want)
	if !errors.Is(err, ErrNotAssigned) {
		return id, err
	}
	patience, cancel := context.WithTimeout(ctx, r.cfg.IdentityWait)
	defer cancel()
	for {
		if r.expired.Load() {
			return Identity{}, ErrStale
		}
		s := r.current.Load()
		o := s.byAddr[addr]
		if o.pod == nil || o.pod.UID != pod.UID {
			return Identity{}, fmt.Errorf("%w any more (%s)", ErrUnknownAddress, addr)
		}
		if id, err = o.pod.Identity(want); !errors.Is(err, ErrNotAssigned) {
			return id, err
		}
		if !r.waiting.forChange(patience, r.current.Load, addr, s) {
			return Identity{}, errors.Join(ctx.Err(), err)
		}
	}
}

// Holder returns the pod that holds addr now, as far as is known; nil if none or more
// than one does. It does not wait.
func (r *Resolver) Holder(addr netip.Addr) *Pod {
	return r.current.Load().byAddr[addr].pod
}

// Addresses returns the addresses that pods of this node hold now, in no order,
// and a channel that is closed when they may have changed.
func (r *Resolver) Addresses() ([]netip.Addr, <-chan struct{}) {
	s := r.current.Load()
	return slices.Collect(maps.Keys(s.byAddr)), s.replaced
}

// update decides anew for the pods that something has changed for, and publishes
// the result. It returns a channel that says when to do so again for the time
// alone.
func (r *Resolver) update() (expiry <-chan time.Time) {
	t := r.tables
	t.mu.Lock()
	for pod := range t.dirty {
		if row := t.pods[pod]; row != nil && len(row.claimed()) > 0 {
			r.decided[pod] = r.decide(row)
		} else {
			delete(r.decided, pod)
		}
	}
	clear(t.dirty)
	t.mu.Unlock()

	now := time.Now()
	next, expires := newSnapshot(maps.Values(r.decided), now)
	before := r.current.Load()
	for addr, o := range next.byAddr {
		if o.err != nil && before.byAddr[addr].err == nil {
			r.ambiguous.Add(1)
			r.cfg.Logger.Warn("an address has more than one owner; nobody gets a token by it", "error", o.err)
		}
	}
	r.current.Store(next)
	r.waiting.wake(before, next)
	close(before.replaced)
	if !expires.IsZero() {
		expiry = time.After(expires.Sub(now))
	}
	return expiry
}
