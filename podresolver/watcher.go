package podresolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// watcher keeps the objects of one resource up to date, and knows how well that works.
type watcher struct {
	resource  string // as "kubectl get" takes it
	log       *slog.Logger
	reflector *cache.Reflector
	listOnce  func(context.Context) error // instead of running the reflector
	setEmpty  func()                      // nil if the API server must have the resource
	synced    chan struct{}               // closed after the first complete list

	mu             sync.Mutex      // guards all following fields
	lastError      error           // of the last list or watch; nil if it succeeded
	expectedErrors int             // in a row; the reflector handles them, see retry
	lastObserved   time.Time       // when the API server last sent an object, a list or a bookmark
	served         bool            // a list or a watch has succeeded
	watch          watch.Interface // the current one; nil for none
	relistWanted   bool
	relistedAt     time.Time // when a relist was last wanted
}

// newWatcher returns the watcher of a resource whose objects T are trimmed to Info. An
// optional resource counts as empty as long as the API server has never had it.
func newWatcher[T, Info any](r *Resolver, resource string, lw cache.ListerWatcher, optional bool,
	infos map[cache.ObjectName]*Info, trim func(*T) *Info, changed func(info *Info, present bool),
) *watcher {
	w := &watcher{resource: resource, log: r.cfg.Logger, synced: make(chan struct{})}
	store := &reflectorStore[Info]{objects: r.objects, infos: infos, trim: trimAny(trim), changed: changed, observed: w.observed}
	if optional {
		w.setEmpty = func() { _ = store.Replace(nil, "") } // fails for malformed objects alone
	}
	client := cache.ToListerWatcherWithContext(lw)
	retrying := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (list runtime.Object, err error) {
			err = w.retry(ctx, func() error {
				ctx, cancel := context.WithTimeout(ctx, listTimeout)
				defer cancel()
				list, err = client.ListWithContext(ctx, o)
				return err
			})
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (started watch.Interface, err error) {
			if err := w.takeRelist(o); err != nil {
				return nil, err
			}
			err = w.retry(ctx, func() error { started, err = client.WatchWithContext(ctx, o); return err })
			w.setWatch(started, err)
			return started, err
		},
	}
	w.listOnce = func(ctx context.Context) error {
		list, err := client.ListWithContext(ctx, metav1.ListOptions{})
		if apierrors.IsNotFound(err) && w.setEmpty != nil {
			w.setEmpty()
			return nil
		}
		if err != nil {
			return explainAPIError(resource, err)
		}
		items, err := meta.ExtractList(list)
		if err != nil {
			return fmt.Errorf("%s: reading the list: %w", resource, err)
		}
		objects := make([]any, len(items))
		for i, item := range items {
			objects[i] = item
		}
		return store.Replace(objects, "")
	}
	w.reflector = cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(retrying, lw), new(T), store,
		cache.ReflectorOptions{Name: resource})
	return w
}

const (
	// listTimeout bounds a list, which may be of tens of thousands of objects.
	listTimeout = 2 * time.Minute
	// maxExpectedErrors in a row are normal: a reflector tries WatchList, then an old resource
	// version, then none.
	maxExpectedErrors = 3
	// relistTimeout is how long a wanted list may take before it is wanted again.
	relistTimeout = 30 * time.Second
)

// The API server sends a bookmark over each watch about once a minute, if it knows of a newer
// resource version by then. That takes progress notifications from etcd, which not every
// cluster has (k8s.io/apiserver v0.35, pkg/storage/cacher, cacheWatcher.process). So a silent
// watch is not an error by itself. One that stays silent is replaced by a list; if that gets
// no response either, the API server is down or the connection is broken, by a proxy for
// example that accepts watches and forwards nothing.

// relistIfStale stops a watch that has been silent for longer than limit, and makes the
// reflector list. It is called periodically.
func (w *watcher) relistIfStale(now time.Time, limit time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !closed(w.synced) || now.Sub(w.lastObserved) <= limit || now.Sub(w.relistedAt) <= relistTimeout {
		return
	}
	w.relistedAt, w.relistWanted = now, true
	if w.watch != nil {
		w.watch.Stop()
	}
}

// takeRelist returns the error that makes a reflector list instead of starting a watch, if a
// list is wanted.
func (w *watcher) takeRelist(o metav1.ListOptions) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	relist := w.relistWanted && o.SendInitialEvents == nil // otherwise the watch begins with a list
	w.relistWanted = false
	if relist {
		return apierrors.NewResourceExpired("the watch has been silent for too long")
	}
	return nil
}

func (w *watcher) setWatch(started watch.Interface, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.watch = nil; err == nil {
		w.watch = started
	}
}

// retryBackoff ends with delays that are short enough for an operator who waits after a
// repair, and long enough for an API server that a thousand nodes reconnect to.
var retryBackoff = wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 0.5, Cap: 15 * time.Second, Steps: math.MaxInt}

// retry repeats a call to the API server until it succeeds, ctx ends, or the error is one that
// the reflector has to see. If the reflector itself retried, a refused connection would not be
// reported, delays would be up to a minute, and they could not be interrupted (client-go
// v0.37, Reflector.watchList).
func (w *watcher) retry(ctx context.Context, call func() error) error {
	return retryBackoff.DelayFunc().Until(ctx, true, true, func(ctx context.Context) (done bool, _ error) {
		err := call()
		switch {
		case ctx.Err() != nil:
			return false, ctx.Err()
		case err == nil:
			w.succeeded()
			return true, nil
		case apierrors.IsInvalid(err), apierrors.IsResourceExpired(err), apierrors.IsGone(err), apierrors.IsTimeout(err):
			// WatchList is not supported, or the resource version is too old or too new.
			w.mu.Lock()
			w.expectedErrors++
			tooMany := w.expectedErrors > maxExpectedErrors
			w.mu.Unlock()
			if tooMany {
				w.failed(err)
			}
			return false, err
		}
		w.failed(err)
		return false, nil
	})
}

// observed records that the API server has sent something; list is true for a complete list.
func (w *watcher) observed(list bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lastObserved = time.Now()
	if list && !closed(w.synced) {
		close(w.synced)
	}
}

// failed records an error. A repeated one is logged once.
func (w *watcher) failed(cause error) {
	err := explainAPIError(w.resource, cause)
	w.mu.Lock()
	isNew := w.lastError == nil || w.lastError.Error() != err.Error()
	w.lastError = err
	// If the API server has had the resource before, its CRD may be about to be recreated.
	neverServed := apierrors.IsNotFound(cause) && !w.served
	w.mu.Unlock()
	if isNew {
		w.log.Warn("cannot watch the API server; retrying", "error", err)
	}
	if neverServed && w.setEmpty != nil {
		w.setEmpty()
	}
}

func (w *watcher) succeeded() {
	w.mu.Lock()
	before := w.lastError
	w.lastError, w.expectedErrors = nil, 0
	w.served = true
	w.mu.Unlock()
	if before != nil {
		w.log.Info("watching the API server again", "resource", w.resource)
	}
}

// explainAPIError says what an operator has to do about an error.
func explainAPIError(resource string, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%s: the API server does not have this resource: apply the custom resource definitions (deploy/manifests/crds.yaml)", resource)
	case apierrors.IsForbidden(err):
		role := "deploy/manifests/account.yaml"
		if resource == serviceAccounts.Resource {
			role = "deploy/federation/service-accounts.yaml"
		}
		return fmt.Errorf("%s: the agent's service account may not list and watch this resource: apply its ClusterRole (%s): %w", resource, role, err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s: the API server rejected the agent's credentials: check KUBECONFIG or the service account token: %w", resource, err)
	}
	var request *url.Error // its URL is long, and differs for each try
	if errors.As(err, &request) {
		return fmt.Errorf("%s: cannot reach the API server: see whether it is up, and whether the node reaches its address: %w", resource, request.Err)
	}
	return fmt.Errorf("%s: the API server returned an error: %w", resource, err)
}

// syncError is why the watcher has not synced yet; nil once it has.
func (w *watcher) syncError() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case closed(w.synced):
		return nil
	case w.lastError != nil:
		return w.lastError
	}
	return fmt.Errorf("%s: waiting for the first list", w.resource)
}

// staleError is why the objects may be out of date: the resource cannot be watched, or nothing
// was observed for longer than limit. It is nil if they are up to date.
func (w *watcher) staleError(now time.Time, limit time.Duration) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	staleFor := now.Sub(w.lastObserved)
	switch {
	case w.lastError != nil:
		return w.lastError
	case !closed(w.synced) || staleFor <= limit:
		return nil
	}
	return fmt.Errorf("%s: the API server has sent nothing for %s, not even when listed: is a proxy or a firewall in between?", w.resource, staleFor.Truncate(time.Second))
}

// staleFor is the time since the API server last sent something.
func (w *watcher) staleFor(now time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return now.Sub(w.lastObserved)
}
