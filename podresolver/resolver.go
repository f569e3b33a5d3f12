// Package podresolver finds out who is calling and what they may use: a source
// address becomes a pod, a pod an identity.
//
// The life of a decision:
//
//  1. Informers keep what decisions need, and only that, of this node's pods
//     and of the cluster's identities, bindings and exceptions.
//  2. A change marks its namespace. One goroutine decides anew for the pods of
//     the marked namespaces and publishes a snapshot: address to pod, with the
//     pod's identities in order. A storm of changes is one recomputation.
//  3. Resolve is one atomic load and one map lookup.
//  4. An address that is not known waits, bounded, for the next snapshots, since
//     a pod can ask before its status has reached the API server's watchers.
//
// Nothing is answered before every informer has synced: a decision taken without
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

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// DefaultPodWait is how long a request from an unknown address waits for its
// pod unless told otherwise.
const DefaultPodWait = 3 * time.Second

// Config says which node's pods to resolve. Node is required.
type Config struct {
	Node    string
	PodWait time.Duration // 0 means DefaultPodWait
	Logger  *slog.Logger  // nil means slog.Default
}

// Resolver resolves addresses of this node's pods. It is safe for concurrent
// use once Run is called.
type Resolver struct {
	cfg Config

	pods       *source
	identities *source
	bindings   *source
	exceptions *source

	current atomic.Pointer[snapshot]
	synced  chan struct{} // closed when the first complete snapshot is published

	mu    sync.Mutex // guards dirty
	dirty map[string]struct{}
	wake  chan struct{} // of capacity 1: dirty has something in it

	claims map[string][]claim // by namespace; the deciding goroutine's alone
}

// New returns a Resolver that reads from the two clients once Run is called.
func New(kube kubernetes.Interface, custom dynamic.Interface, cfg Config) (*Resolver, error) {
	if cfg.Node == "" {
		return nil, errors.New("the node's name is needed to know its pods")
	}
	if cfg.PodWait == 0 {
		cfg.PodWait = DefaultPodWait
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	r := &Resolver{
		cfg:    cfg,
		synced: make(chan struct{}),
		dirty:  make(map[string]struct{}),
		wake:   make(chan struct{}, 1),
		claims: make(map[string][]claim),
	}
	first, _ := newSnapshot(nil, time.Time{})
	r.current.Store(first)
	var failed [4]error
	r.pods, failed[0] = podSource(kube, cfg.Node, r.mark, cfg.Logger)
	r.identities, failed[1] = customSource(custom, aadpodidentity.AzureIdentities, trimIdentity, r.mark, cfg.Logger)
	r.bindings, failed[2] = customSource(custom, aadpodidentity.AzureIdentityBindings, trimBinding, r.mark, cfg.Logger)
	r.exceptions, failed[3] = customSource(custom, aadpodidentity.AzurePodIdentityExceptions, trimException, r.mark, cfg.Logger)
	if err := errors.Join(failed[:]...); err != nil {
		return nil, fmt.Errorf("making informers: %w", err)
	}
	return r, nil
}

func (r *Resolver) sources() []*source {
	return []*source{r.pods, r.identities, r.bindings, r.exceptions}
}

// Run keeps the snapshots up to date until ctx ends, and returns when all its
// goroutines have.
func (r *Resolver) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, s := range r.sources() {
		wg.Go(func() { s.informer.RunWithContext(ctx) })
	}
	defer wg.Wait()

	for _, s := range r.sources() {
		select {
		case <-s.handler.HasSyncedChecker().Done():
		case <-ctx.Done():
			return
		}
	}
	expiry := r.update()
	close(r.synced)
	for {
		select {
		case <-r.wake:
			expiry = r.update()
		case <-expiry:
			expiry = r.update()
		case <-ctx.Done():
			return
		}
	}
}

// Synced is closed once every informer has synced and lookups are answered.
func (r *Resolver) Synced() <-chan struct{} { return r.synced }

// Ready returns nil once Synced is closed, before that an error which says what
// is awaited and what the API server last said about it.
func (r *Resolver) Ready() error {
	select {
	case <-r.synced:
		return nil
	default:
	}
	var waiting []error
	for _, s := range r.sources() {
		if err := s.pending(); err != nil {
			waiting = append(waiting, err)
		}
	}
	if len(waiting) == 0 {
		waiting = append(waiting, errors.New("taking the first snapshot"))
	}
	return errors.Join(waiting...)
}

// Stale returns why decisions may be out of date: what the API server last said
// where it cannot be watched now. Known pods keep what they were given meanwhile.
// It returns nil when all is well.
func (r *Resolver) Stale() error {
	var all []error
	for _, s := range r.sources() {
		all = append(all, s.trouble())
	}
	return errors.Join(all...)
}

// Resolve returns the pod that holds addr now. An unknown address is waited for
// as long as Config.PodWait and ctx allow, then it is ErrUnknownAddress; one
// that several live pods claim is ErrAmbiguousAddress at once.
func (r *Resolver) Resolve(ctx context.Context, addr netip.Addr) (*Pod, error) {
	s := r.current.Load()
	if o, ok := s.byAddr[addr]; ok {
		return o.pod, o.err
	}
	return r.await(ctx, addr, s)
}

func (r *Resolver) await(ctx context.Context, addr netip.Addr, s *snapshot) (*Pod, error) {
	patience := time.NewTimer(r.cfg.PodWait)
	defer patience.Stop()
	for {
		select {
		case <-s.replaced:
		case <-patience.C:
			return nil, fmt.Errorf("%w (%s)", ErrUnknownAddress, addr)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		s = r.current.Load()
		if o, ok := s.byAddr[addr]; ok {
			return o.pod, o.err
		}
	}
}

// Addresses returns the addresses that pods of this node hold now, in no order,
// and a channel that is closed when they may have changed.
func (r *Resolver) Addresses() ([]netip.Addr, <-chan struct{}) {
	s := r.current.Load()
	return slices.Collect(maps.Keys(s.byAddr)), s.replaced
}

// mark notes that something in a namespace changed.
func (r *Resolver) mark(namespace string) {
	r.mu.Lock()
	r.dirty[namespace] = struct{}{}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// update decides anew for the pods of marked namespaces and publishes the result.
// It returns a channel that says when to do so again for the time alone.
func (r *Resolver) update() (expiry <-chan time.Time) {
	r.mu.Lock()
	dirty := r.dirty
	r.dirty = make(map[string]struct{})
	r.mu.Unlock()

	for namespace := range dirty {
		delete(r.claims, namespace)
		if claims := r.decideNamespace(namespace); len(claims) > 0 {
			r.claims[namespace] = claims
		}
	}
	var all []claim
	for _, claims := range r.claims {
		all = append(all, claims...)
	}
	now := time.Now()
	next, expires := newSnapshot(all, now)
	before := r.current.Load()
	for addr, o := range next.byAddr {
		if o.err != nil && before.byAddr[addr].err == nil {
			r.cfg.Logger.Warn("an address has more than one owner; nobody gets a token by it", "error", o.err)
		}
	}
	r.current.Store(next)
	close(before.replaced)
	if !expires.IsZero() {
		expiry = time.After(expires.Sub(now))
	}
	return expiry
}

func (r *Resolver) decideNamespace(namespace string) []claim {
	pods := inNamespace[*corev1.Pod](r.pods, namespace)
	if len(pods) == 0 {
		return nil
	}
	objects := &namespaceObjects{
		identities: make(map[string]*aadpodidentity.AzureIdentity),
		bindings:   inNamespace[*aadpodidentity.AzureIdentityBinding](r.bindings, namespace),
		exceptions: inNamespace[*aadpodidentity.AzurePodIdentityException](r.exceptions, namespace),
	}
	sortBindings(objects.bindings)
	for _, id := range inNamespace[*aadpodidentity.AzureIdentity](r.identities, namespace) {
		objects.identities[id.Name] = id
	}
	var claims []claim
	for _, pod := range pods {
		// The API server filters by node already; this is for one that does not.
		if pod.Spec.NodeName == r.cfg.Node {
			claims = append(claims, claimsOf(pod, decide(pod, objects))...)
		}
	}
	return claims
}

// inNamespace lists a source's objects in one namespace.
func inNamespace[T any](s *source, namespace string) []T {
	found, err := s.informer.GetIndexer().ByIndex(cache.NamespaceIndex, namespace)
	if err != nil {
		panic(err) // the index is there since newSource
	}
	out := make([]T, 0, len(found))
	for _, obj := range found {
		if typed, ok := obj.(T); ok {
			out = append(out, typed)
		}
	}
	return out
}
