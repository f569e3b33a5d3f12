package podresolver_test

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

var (
	addr  = netip.MustParseAddr("10.244.0.7")
	other = netip.MustParseAddr("10.244.0.8")
)

// world is a cluster and a resolver that reads from it through gates.
type world struct {
	t *testing.T
	*resolvertest.Cluster
	resolver *podresolver.Resolver
	gates    struct{ pods, identities, bindings, exceptions, assigned *gate }
	stop     func()
}

// newWorld returns a world that does not run yet. All of it is in the bubble that
// it was made in.
func newWorld(t *testing.T, cfg podresolver.Config, objects ...runtime.Object) *world {
	t.Helper()
	w := &world{t: t, Cluster: resolvertest.NewCluster(objects...)}
	t.Cleanup(w.Close)
	cfg.Node = "node1"
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	sources := w.Sources()
	for lw, g := range map[*cache.ListerWatcher]**gate{
		&sources.Pods: &w.gates.pods, &sources.Identities: &w.gates.identities, &sources.Bindings: &w.gates.bindings,
		&sources.Exceptions: &w.gates.exceptions, &sources.Assigned: &w.gates.assigned,
	} {
		*g = &gate{to: cache.ToListerWatcherWithContext(*lw)}
		*lw = *g
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

// start returns a world that has synced and is watched.
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
	return []runtime.Object{podresolver.NewIdentity("cart", "C1", "/r/1"), podresolver.NewBinding("cart", "cart", "cart", 0)}
}

// name is whose an address is.
func (w *world) name(addr netip.Addr) string {
	w.t.Helper()
	pod, err := w.resolver.Resolve(w.t.Context(), addr)
	require.NoError(w.t, err)
	return pod.Name
}

// together calls do a thousand times at once, and says how long that took.
func together(do func()) time.Duration {
	begin := time.Now()
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(do)
	}
	wg.Wait()
	return time.Since(begin)
}

// gate is a source that can fail, and remembers what it was asked.
type gate struct {
	to cache.ListerWatcherWithContext

	mu       sync.Mutex
	err      error // of both calls; nil for none
	delay    time.Duration
	lists    []metav1.ListOptions
	watchers []watch.Interface
}

// IsWatchListSemanticsUnSupported is how client-go finds out that there are lists
// alone.
func (*gate) IsWatchListSemanticsUnSupported() bool { return true }

func (g *gate) ListWithContext(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	g.mu.Lock()
	g.lists = append(g.lists, o)
	err, delay := g.err, g.delay
	g.mu.Unlock()
	// No timer for no time at all: the race detector does not survive many of those
	// at once in a bubble (go.dev/issue/78156).
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err != nil {
		return nil, err
	}
	return g.to.ListWithContext(ctx, o)
}

func (g *gate) WatchWithContext(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return nil, g.err
	}
	w, err := g.to.WatchWithContext(ctx, o)
	g.watchers = append(g.watchers, w)
	return w, err
}

func (g *gate) List(o metav1.ListOptions) (runtime.Object, error) {
	return g.ListWithContext(context.Background(), o)
}

func (g *gate) Watch(o metav1.ListOptions) (watch.Interface, error) {
	return g.WatchWithContext(context.Background(), o)
}

// fail makes all calls fail from now on, and cuts the watches; nil mends it.
func (g *gate) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err = err
	for _, w := range g.watchers {
		w.Stop()
	}
	g.watchers = nil
}

func (g *gate) slow(by time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.delay = by
}

// lookups are the lists that asked for one address.
func (g *gate) lookups() (asked []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, o := range g.lists {
		if o.FieldSelector != "" {
			asked = append(asked, o.FieldSelector)
		}
	}
	return asked
}

func TestANodeIsNeeded(t *testing.T) {
	_, err := podresolver.New(podresolver.Sources{}, podresolver.Config{})
	assert.ErrorContains(t, err, "the node's name")
}
