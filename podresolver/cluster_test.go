package podresolver_test

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// One of client-go's error handlers sleeps depending on the time of the last error, which may
// be years ahead in another synctest bubble.
func init() { utilruntime.ErrorHandlers = nil }

var (
	addr  = netip.MustParseAddr("10.244.0.7")
	other = netip.MustParseAddr("10.244.0.8")
)

// world is a cluster, and a resolver that reads it through sources that can fail.
type world struct {
	t *testing.T
	*resolvertest.Cluster
	resolver *podresolver.Resolver
	api      struct{ pods, identities, bindings, exceptions, assigned *faultySource }
	stop     func()
}

// newWorld returns a world whose resolver does not run yet. It belongs to the current synctest
// bubble.
func newWorld(t *testing.T, cfg podresolver.Config, objects ...runtime.Object) *world {
	t.Helper()
	w := &world{t: t, Cluster: resolvertest.NewCluster(objects...)}
	t.Cleanup(w.Close)
	cfg.Node = "node1"
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	sources := w.Sources()
	for lw, g := range map[*cache.ListerWatcher]struct {
		faultySource **faultySource
		object       func() resource
	}{
		&sources.Pods:       {&w.api.pods, func() resource { return &corev1.Pod{} }},
		&sources.Identities: {&w.api.identities, func() resource { return &aadpodidentity.AzureIdentity{} }},
		&sources.Bindings:   {&w.api.bindings, func() resource { return &aadpodidentity.AzureIdentityBinding{} }},
		&sources.Exceptions: {&w.api.exceptions, func() resource { return &aadpodidentity.AzurePodIdentityException{} }},
		&sources.Assigned:   {&w.api.assigned, func() resource { return &aadpodidentity.AzureAssignedIdentity{} }},
	} {
		*g.faultySource = &faultySource{to: cache.ToListerWatcherWithContext(*lw), object: g.object}
		*lw = *g.faultySource
	}
	var err error
	w.resolver, err = podresolver.New(sources, cfg)
	require.NoError(t, err)
	return w
}

func (w *world) run() {
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.resolver.Run(ctx)
	}()
	w.stop = func() {
		cancel()
		<-done
	}
	w.t.Cleanup(w.stop)
}

// start returns a world that has synced.
func start(t *testing.T, cfg podresolver.Config, objects ...runtime.Object) *world {
	t.Helper()
	w := newWorld(t, cfg, objects...)
	w.run()
	<-w.resolver.Synced()
	synctest.Wait()
	return w
}

// cart is an identity, and a binding of it to the label "cart".
func cart() []runtime.Object {
	return []runtime.Object{resolvertest.Identity("cart", resolvertest.GUID("C1"), resolvertest.ResourceID("/r/1")), resolvertest.Binding("cart", "cart", "cart")}
}

// name resolves an address to the name of its pod.
func (w *world) name(addr netip.Addr) string {
	w.t.Helper()
	pod, err := w.resolver.Resolve(w.t.Context(), addr)
	require.NoError(w.t, err)
	return pod.Name
}

// concurrently calls do a thousand times at once, and returns how long that took.
func concurrently(do func()) time.Duration {
	begin := time.Now()
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(do)
	}
	wg.Wait()
	return time.Since(begin)
}

// faultySource is a source that can fail, and records its lists.
type faultySource struct {
	to     cache.ListerWatcherWithContext
	object func() resource // returns an empty one

	mu       sync.Mutex
	err      error // of both calls; nil for none
	muted    bool  // watches start, but send nothing
	hanging  bool  // lists do not return
	delay    time.Duration
	lists    []metav1.ListOptions
	watchers []*faultyWatch
}

// faultyWatch forwards events, and sends bookmarks.
type faultyWatch struct {
	watch.Interface
	to    chan watch.Event
	marks chan struct{} // requests a bookmark
	done  chan struct{}
	stop  func()
}

func (w *faultyWatch) ResultChan() <-chan watch.Event { return w.to }
func (w *faultyWatch) Stop()                          { w.stop() }

// run returns when the source's watch ends or Stop is called. version is the last resource
// version that was sent.
func (w *faultyWatch) run(muted func() bool, version string, object func() resource) {
	defer close(w.to)
	for {
		var e watch.Event
		select {
		case <-w.done:
			return
		case <-w.marks:
			mark := object()
			mark.SetResourceVersion(version)
			e = watch.Event{Type: watch.Bookmark, Object: mark}
		case sent, ok := <-w.Interface.ResultChan():
			if !ok {
				return
			}
			e = sent
		}
		if muted() {
			continue
		}
		if o, ok := e.Object.(metav1.Object); ok {
			version = o.GetResourceVersion()
		}
		select {
		case w.to <- e:
		case <-w.done:
			return
		}
	}
}

type resource interface {
	runtime.Object
	metav1.Object
}

// IsWatchListSemanticsUnSupported tells client-go to list.
func (*faultySource) IsWatchListSemanticsUnSupported() bool { return true }

func (g *faultySource) ListWithContext(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	g.mu.Lock()
	g.lists = append(g.lists, o)
	err, delay := g.err, g.delay
	g.mu.Unlock()
	// No timer of zero: the race detector crashes with many of them in a bubble
	// (go.dev/issue/78156).
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	for g.isHanging() {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err != nil {
		return nil, err
	}
	return g.to.ListWithContext(ctx, o)
}

func (g *faultySource) WatchWithContext(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return nil, g.err
	}
	from, err := g.to.WatchWithContext(ctx, o)
	if err != nil {
		return nil, err
	}
	w := &faultyWatch{Interface: from, to: make(chan watch.Event), marks: make(chan struct{}), done: make(chan struct{})}
	w.stop = sync.OnceFunc(func() { close(w.done); from.Stop() })
	go w.run(g.isMuted, o.ResourceVersion, g.object)
	g.watchers = append(g.watchers, w)
	return w, nil
}

func (g *faultySource) isMuted() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.muted
}

func (g *faultySource) isHanging() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.hanging
}

// mute keeps watches open without events; with hang, lists do not return either.
func (g *faultySource) mute(hang bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.muted, g.hanging = true, hang
}

// bookmark sends a bookmark over each watch.
func (g *faultySource) bookmark() {
	g.mu.Lock()
	watchers := slices.Clone(g.watchers)
	g.mu.Unlock()
	for _, w := range watchers {
		select {
		case w.marks <- struct{}{}:
		case <-w.done:
		}
	}
}

func (g *faultySource) List(o metav1.ListOptions) (runtime.Object, error) {
	return g.ListWithContext(context.Background(), o)
}

func (g *faultySource) Watch(o metav1.ListOptions) (watch.Interface, error) {
	return g.WatchWithContext(context.Background(), o)
}

// fail makes all calls fail, and ends the watches; nil repairs it.
func (g *faultySource) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err, g.muted, g.hanging = err, false, false
	for _, w := range g.watchers {
		w.Stop()
	}
	g.watchers = nil
}

func (g *faultySource) slow(by time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.delay = by
}

// lookups are the field selectors of the lists that had one.
func (g *faultySource) lookups() (selectors []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, o := range g.lists {
		if o.FieldSelector != "" {
			selectors = append(selectors, o.FieldSelector)
		}
	}
	return selectors
}

func TestNodeIsRequired(t *testing.T) {
	_, err := podresolver.New(podresolver.Sources{}, podresolver.Config{})
	assert.ErrorContains(t, err, "the name of the node is required")
}
