// Package podresolver finds out which pod is calling and which identities it may use: a source
// address becomes a pod, and the pod an identity.
//
// The life of a decision:
//
//  1. Reflectors store trimmed objects: this node's pods, and the identities, bindings and
//     exceptions of the cluster.
//  2. A change marks the pods that it affects. One goroutine decides these again and publishes
//     a snapshot: address to Pod, with its identities in order. Changes that arrive meanwhile
//     share the next snapshot.
//  3. Resolve is one atomic load and one map lookup.
//  4. A request from an unknown address waits, for a bounded time, for the pod's event, because
//     a pod may send a request before the event with its address arrives. Then the address is
//     looked up at the API server, once.
//
// Nothing is decided before all resources are listed: without the exceptions, for example, a
// decision would be wrong.
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

// Mode is what decides which identities a pod may use.
type Mode string

const (
	// Managed uses the AzureIdentityBindings in the pod's namespace.
	Managed Mode = "managed"
	// Standard uses the AzureAssignedIdentities that the MIC controller creates.
	Standard Mode = "standard"
)

// Defaults of Config.
const (
	// The kubelet starts containers before it tells the API server their pod's address: a
	// second or two later (its PLEG looks once a second), and up to 10 s where 40 pods start
	// at once on two busy cores.
	DefaultPodWait      = 10 * time.Second
	DefaultIdentityWait = 10 * time.Second
)

// Config is the configuration of a Resolver. Node is required.
type Config struct {
	Node string
	Mode Mode // "" means Managed
	// Namespaced limits identities to pods of their own namespace in Standard mode. In
	// Managed mode they always are.
	Namespaced bool
	// MICNamespace is the namespace of the Deployment "mic", whose pods are excepted in
	// Standard mode; "" excepts none. Managed mode has no MIC.
	MICNamespace string
	// ExceptionNamespaces are the namespaces whose AzurePodIdentityExceptions apply: nil for
	// all, empty for none.
	ExceptionNamespaces []string
	Deny                DenyList
	Federation          Federation
	// StrictSelection refuses a request without a selector if the pod has several
	// identities, as IMDS does, instead of using the default. Those of its service account do
	// not count if a binding matches it.
	StrictSelection bool
	// ByUID resolves pods by the addresses of function ByUID, too, whatever state they are in
	// and wherever their network is.
	ByUID bool
	// HostNetworkAll says that the requests of all pods on the host network come to the agent, with
	// ByUID; otherwise those of pods that have identities of their own. It is for explanations.
	HostNetworkAll bool

	PodWait      time.Duration // how long a request from an unknown address waits for its pod; 0 means DefaultPodWait
	IdentityWait time.Duration // how long a request waits for MIC's assignment; 0 means DefaultIdentityWait
	// MaxStaleness is how long decisions are valid after the API server last sent something
	// of a resource, be it a bookmark. After two thirds of it the resource is listed again. 0
	// means forever.
	MaxStaleness time.Duration
	Logger       *slog.Logger `json:"-"` // nil means slog.Default
}

// Resolver resolves the addresses of this node's pods. It is safe for concurrent use.
type Resolver struct {
	cfg      Config
	objects  *objects
	watchers []*watcher

	current atomic.Pointer[snapshot]
	synced  chan struct{} // closed when the first complete snapshot is published
	expired atomic.Bool   // a resource has been silent for longer than MaxStaleness
	waiters waiters

	decided map[cache.ObjectName]*Pod // owned by the deciding goroutine, as is changes
	changes changeLog

	podLister   cache.ListerWatcherWithContext // for lookups
	trimPod     func(*corev1.Pod) *podInfo
	lookups     singleflight.Group
	lookupLimit *rate.Limiter
	counts      counts
}

// New returns a Resolver that reads from the sources once Run is called.
func New(from Sources, cfg Config) (*Resolver, error) {
	if cfg.Node == "" {
		return nil, errors.New("the name of the node is required")
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
		cfg.MICNamespace = "" // any author of a pod could make it look like MIC's
	}
	o := newObjects(standard && !cfg.Namespaced)
	r := &Resolver{
		cfg: cfg, objects: o, synced: make(chan struct{}), decided: make(map[cache.ObjectName]*Pod), changes: newChangeLog(cfg.Logger),
		podLister: cache.ToListerWatcherWithContext(from.Pods), trimPod: podInfoFor(cfg.Node, cfg.MICNamespace, cfg.ByUID),
		lookupLimit: rate.NewLimiter(lookupRate, lookupBurst),
	}
	r.watchers = []*watcher{
		newWatcher(r, "pods", from.Pods, false, o.pods, r.trimPod, o.podChangedLocked),
		newWatcher(r, aadpodidentity.AzureIdentities.GroupResource().String(), from.Identities, false, o.identities, newIdentityInfo, o.identityChangedLocked),
		newWatcher(r, aadpodidentity.AzureIdentityBindings.GroupResource().String(), from.Bindings, false, o.bindings, newBindingInfo, o.bindingChangedLocked),
		newWatcher(r, aadpodidentity.AzurePodIdentityExceptions.GroupResource().String(), from.Exceptions, true, o.exceptions, newExceptionInfo, o.exceptionChangedLocked),
	}
	if standard {
		r.watchers = append(r.watchers,
			newWatcher(r, aadpodidentity.AzureAssignedIdentities.GroupResource().String(), from.Assigned, false, o.assigned, assignmentInfoFor(cfg.Node), o.assignmentChangedLocked))
	}
	if cfg.Federation.ServiceAccounts {
		r.watchers = append(r.watchers, newWatcher(r, serviceAccounts.Resource, from.ServiceAccounts, false, o.accounts, newAccountInfo, o.accountChangedLocked))
	}
	first, _ := newSnapshot(maps.Values(r.decided), time.Time{})
	r.current.Store(first)
	return r, nil
}

// Read returns a synced Resolver of the objects that there are now, for Explain: it must not be
// Run. If a resource cannot be listed it does not retry, and returns what to do about it.
func Read(ctx context.Context, from Sources, cfg Config) (*Resolver, error) {
	r, err := New(from, cfg)
	if err != nil {
		return nil, err
	}
	var missing []error
	for _, w := range r.watchers {
		missing = append(missing, w.listOnce(ctx))
	}
	if err := errors.Join(missing...); err != nil {
		return nil, err
	}
	r.update()
	close(r.synced)
	return r, nil
}

// Run keeps the snapshot up to date until ctx ends. Its goroutines have ended when it returns.
func (r *Resolver) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, w := range r.watchers {
		wg.Go(func() { w.reflector.RunWithContext(ctx) })
	}
	defer wg.Wait()

	for _, w := range r.watchers {
		select {
		case <-w.synced:
		case <-ctx.Done():
			return
		}
	}
	expiry := r.update()
	close(r.synced)
	every := defaultStaleLimit / 30
	if r.cfg.MaxStaleness > 0 {
		every = min(time.Second, r.cfg.MaxStaleness/10)
	}
	staleness := time.NewTicker(every)
	defer staleness.Stop()
	for {
		select {
		case <-r.objects.wake:
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

// Resolve returns the pod that has addr now. A request from an unknown address waits as long as
// Config.PodWait and ctx allow, then the address is looked up once; then the error is
// ErrUnknownAddress, or ErrNotSynced before the first snapshot. An address that several live
// pods claim is ErrAmbiguousAddress at once. ErrStale means that no decision is valid.
func (r *Resolver) Resolve(ctx context.Context, addr netip.Addr) (*Pod, error) {
	return r.ResolveCaller(ctx, addr, func(*Pod) error { return nil })
}

// ResolveCaller is Resolve for a caller that confirm can tell from other pods. A pod for which
// confirm returns ErrUnconfirmed is treated like an unknown one: the request waits. The last
// error of confirm is returned. It may be called several times.
func (r *Resolver) ResolveCaller(ctx context.Context, addr netip.Addr, confirm func(*Pod) error) (*Pod, error) {
	if r.expired.Load() {
		r.counts.resolved(OutcomeFound, ErrStale)
		return nil, ErrStale
	}
	s := r.current.Load()
	pod, err := s.resolve(addr, confirm)
	switch {
	case err == nil || !retriable(err):
		r.counts.resolved(OutcomeFound, err)
		return pod, err
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	began := time.Now()
	pod, err = r.waitForPod(ctx, addr, s, err, confirm)
	r.counts.waited.Add(int64(time.Since(began)))
	r.counts.resolved(OutcomeWaited, err)
	return pod, err
}

// ResolveNow is ResolveCaller for a request that does not wait. Its caller counts it, because that
// would take longer than the rest: it is not in Stats.
func (r *Resolver) ResolveNow(addr netip.Addr, confirm func(*Pod) error) (*Pod, error) {
	if r.expired.Load() {
		return nil, ErrStale
	}
	return r.current.Load().resolve(addr, confirm)
}

// retriable reports whether an event may resolve the error.
func retriable(err error) bool {
	return errors.Is(err, ErrUnknownAddress) || errors.Is(err, ErrUnconfirmed)
}

// waitForPod resolves addr after err in the snapshot s.
func (r *Resolver) waitForPod(ctx context.Context, addr netip.Addr, s *snapshot, err error, confirm func(*Pod) error) (pod *Pod, _ error) {
	podWait, cancel := context.WithTimeout(ctx, r.cfg.PodWait)
	defer cancel()
	for r.waiters.waitForChange(podWait, r.current.Load, addr, s) {
		s = r.current.Load()
		if pod, err = s.resolve(addr, confirm); err == nil || !retriable(err) {
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
	if uid := UIDOf(addr); uid != "" { // the API server cannot look it up
		return nil, err
	}
	pod, lookupErr := r.lookup(ctx, addr)
	if lookupErr == nil {
		lookupErr = confirm(pod)
	}
	switch {
	case lookupErr == nil:
		return pod, nil
	case errors.Is(err, ErrUnconfirmed):
		return nil, err // more useful than that the lookup found no other pod
	}
	return nil, lookupErr
}

// Identity returns the identity that a request from addr gets, which was resolved to pod; see
// (*Pod).Identity. One that MIC has yet to assign is waited for as long as Config.IdentityWait
// and ctx allow, then the error is ErrNotAssigned.
func (r *Resolver) Identity(ctx context.Context, addr netip.Addr, pod *Pod, want Selector) (Identity, error) {
	id, err := pod.Identity(want)
	if !errors.Is(err, ErrNotAssigned) {
		return id, err
	}
	identityWait, cancel := context.WithTimeout(ctx, r.cfg.IdentityWait)
	defer cancel()
	for {
		if r.expired.Load() {
			return Identity{}, ErrStale
		}
		s := r.current.Load()
		o := s.byAddr[addr]
		if o.pod == nil || o.pod.UID != pod.UID {
			return Identity{}, fmt.Errorf("%w any more (%s)", ErrUnknownAddress, describe(addr))
		}
		if id, err = o.pod.Identity(want); !errors.Is(err, ErrNotAssigned) {
			return id, err
		}
		if !r.waiters.waitForChange(identityWait, r.current.Load, addr, s) {
			return Identity{}, errors.Join(ctx.Err(), err)
		}
	}
}

// Owner returns the pod that has addr in the current snapshot; nil if there is none, or addr is
// ambiguous.
func (r *Resolver) Owner(addr netip.Addr) *Pod {
	return r.current.Load().byAddr[addr].pod
}

// Addresses returns the addresses that pods of this node claim, in any order, and a channel
// that is closed when they may have changed.
func (r *Resolver) Addresses() ([]netip.Addr, <-chan struct{}) {
	s := r.current.Load()
	addrs := slices.Collect(maps.Keys(s.byAddr))
	return slices.DeleteFunc(addrs, func(a netip.Addr) bool { return UIDOf(a) != "" }), s.replaced
}

// update decides the dirty pods again and publishes a snapshot. expiry delivers when the next
// update is due because a grace period ends; it is nil if none does.
func (r *Resolver) update() (expiry <-chan time.Time) {
	o := r.objects
	var changes []change
	first := !closed(r.synced) // what there is at the start is no change
	o.mu.Lock()
	for name := range o.dirty {
		if info := o.pods[name]; info != nil && info.callable() {
			before, after := r.decided[name], r.decideLocked(info)
			r.decided[name] = after
			if c := (change{before, after}); !first && c.matters() {
				changes = append(changes, c)
			}
		} else {
			delete(r.decided, name)
		}
	}
	clear(o.dirty)
	o.mu.Unlock()

	now := time.Now()
	next, expires := newSnapshot(maps.Values(r.decided), now)
	next.complete = true // Run and Read wait for all resources
	before := r.current.Load()
	for addr, owner := range next.byAddr {
		if owner.err != nil && before.byAddr[addr].err == nil {
			r.counts.ambiguous.Add(1)
			r.cfg.Logger.Warn("address claimed by several pods; refusing token requests from it", "error", owner.err)
		}
	}
	r.current.Store(next)
	r.waiters.wake(before, next)
	close(before.replaced)
	for _, c := range changes {
		r.changes.report(c)
	}
	if !expires.IsZero() {
		expiry = time.After(expires.Sub(now))
	}
	return expiry
}
