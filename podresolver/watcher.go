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

// source keeps one table up to date with the API server, and knows how that goes.
type source struct {
	name      string // as in a path of the API server
	log       *slog.Logger
	reflector *cache.Reflector
	fill      func(context.Context) error // lists once, without a watch
	empty     func()                      // of an optional resource: there are no objects
	synced    chan struct{}               // closed when the table has been filled

	mu      sync.Mutex      // guards the rest
	lastErr error           // of the list or watch that failed last; nil when the last one did not
	routine int             // errors in a row that the reflector handles by itself, see persist
	heard   time.Time       // when the API server last sent an object, a list or a bookmark
	exists  bool            // it has been listed or watched
	watch   watch.Interface // the latest; nil for none
	ended   time.Time       // when attend last ended a watch
	relist  bool            // attend wants a list
}

// newSource returns a source for a table of R that are parsed from T. A resource
// that is optional counts as empty as long as the API server does not know it.
func newSource[T, R any](r *Resolver, name string, lw cache.ListerWatcher, optional bool,
	rows map[cache.ObjectName]*R, parse func(*T) *R, changed func(row *R, present bool),
) *source {
	s := &source{name: name, log: r.cfg.Logger, synced: make(chan struct{})}
	t := &table[R]{tables: r.tables, rows: rows, parse: rowOf(parse), changed: changed, heard: s.hear}
	if optional {
		s.empty = func() { _ = t.Replace(nil, "") } // it never fails
	}
	calls := cache.ToListerWatcherWithContext(lw)
	persistent := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (list runtime.Object, err error) {
			err = s.persist(ctx, func() error {
				ctx, cancel := context.WithTimeout(ctx, listTimeout)
				defer cancel()
				list, err = calls.ListWithContext(ctx, o)
				return err
			})
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (w watch.Interface, err error) {
			if err := s.startWatch(o); err != nil {
				return nil, err
			}
			err = s.persist(ctx, func() error { w, err = calls.WatchWithContext(ctx, o); return err })
			s.watches(w, err)
			return w, err
		},
	}
	s.fill = func(ctx context.Context) error {
		list, err := calls.ListWithContext(ctx, metav1.ListOptions{})
		if apierrors.IsNotFound(err) && s.empty != nil {
			s.empty()
			return nil
		}
		if err != nil {
			return advise(name, err)
		}
		var items []any
		if err := meta.EachListItem(list, func(o runtime.Object) error { items = append(items, o); return nil }); err != nil {
			return fmt.Errorf("%s: reading the list: %w", name, err)
		}
		return t.Replace(items, "")
	}
	s.reflector = cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(persistent, lw), new(T), t,
		cache.ReflectorOptions{Name: name})
	return s
}

const (
	// listTimeout bounds a list, which may be of tens of thousands of objects.
	listTimeout = 2 * time.Minute
	// maxRoutine errors in a row are no reason to worry: streaming is tried, then an old
	// resource version, then none.
	maxRoutine = 3
)

// The API server sends a bookmark over each watch about once a minute, if it knows of a
// newer resource version by then. That takes etcd's progress notifications, and not every
// cluster has them (k8s.io/apiserver v0.35, pkg/storage/cacher, cacheWatcher.process). So
// silence alone says nothing yet. When it has lasted, everything is listed anew, and if
// that does not come either, the API server is away, or something between is broken: a
// proxy, say, that accepts watches and sends nothing.

// attend ends a watch over which nothing has come for longer than patience, so that
// everything is listed anew. It is called again and again.
func (s *source) attend(now time.Time, patience time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !closed(s.synced) || now.Sub(s.heard) <= patience || now.Sub(s.ended) <= relistPause {
		return
	}
	s.ended, s.relist = now, true
	if s.watch != nil {
		s.watch.Stop()
	}
}

// relistPause is how long a list that was asked for may take before it is asked for again.
const relistPause = 30 * time.Second

// startWatch returns an error that makes the reflector list, if that is what is to be done.
func (s *source) startWatch(o metav1.ListOptions) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	relist := s.relist && o.SendInitialEvents == nil // such a watch begins with a list
	s.relist = false
	if relist {
		return apierrors.NewResourceExpired("nothing has been sent for long")
	}
	return nil
}

// watches notes the watch that has begun.
func (s *source) watches(w watch.Interface, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watch = nil; err == nil {
		s.watch = w
	}
}

// retryDelay is short enough in the end for a person who has just repaired something, and long
// enough for an API server that a thousand nodes come back to.
var retryDelay = wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 0.5, Cap: 15 * time.Second, Steps: math.MaxInt}

// persist repeats a call to the API server until it succeeds, ctx ends, or the
// error is one that the reflector itself must see. A reflector left to repeat the
// call would say nothing of a server that refuses connections, wait for up to a
// minute, and not be stopped meanwhile (client-go v0.37, Reflector.watchList).
func (s *source) persist(ctx context.Context, call func() error) error {
	return retryDelay.DelayFunc().Until(ctx, true, true, func(ctx context.Context) (done bool, _ error) {
		err := call()
		switch {
		case ctx.Err() != nil:
			return false, ctx.Err()
		case err == nil:
			s.succeeded()
			return true, nil
		case apierrors.IsInvalid(err), apierrors.IsResourceExpired(err), apierrors.IsGone(err), apierrors.IsTimeout(err):
			// Streaming is not supported, or the resource version is too old or too new. That
			// is routine, unless it does not end.
			s.mu.Lock()
			s.routine++
			lasting := s.routine > maxRoutine
			s.mu.Unlock()
			if lasting {
				s.failed(err)
			}
			return false, err
		}
		s.failed(err)
		return false, nil
	})
}

// hear notes that the API server has sent something; all says that it was
// everything there is.
func (s *source) hear(all bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = time.Now()
	if all && !closed(s.synced) {
		close(s.synced)
	}
}

// failed notes an error. The log gets each once, not once a try.
func (s *source) failed(cause error) {
	err := advise(s.name, cause)
	s.mu.Lock()
	news := s.lastErr == nil || s.lastErr.Error() != err.Error()
	s.lastErr = err
	// A resource that the API server has known before may be a CRD that is replaced.
	absent := apierrors.IsNotFound(cause) && s.empty != nil && !s.exists
	s.mu.Unlock()
	if news {
		s.log.Warn("cannot watch the API server; trying again", "error", err)
	}
	if absent {
		s.empty()
	}
}

func (s *source) succeeded() {
	s.mu.Lock()
	before := s.lastErr
	s.lastErr, s.routine = nil, 0
	s.exists = true
	s.mu.Unlock()
	if before != nil {
		s.log.Info("watching the API server again", "resource", s.name)
	}
}

// advise adds what to do to errors that somebody has to act on.
func advise(name string, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%s: the API server does not know this resource: apply the custom resource definitions (deploy/manifests/crds.yaml)", name)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s: the agent's service account may not list and watch this resource: apply its role (deploy/manifests/rbac.yaml): %w", name, err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s: the API server does not accept the agent's credentials: check KUBECONFIG or the service account's token: %w", name, err)
	}
	var call *url.Error // its URL is long, and different for each try
	if errors.As(err, &call) {
		return fmt.Errorf("%s: cannot reach the API server (is it up, and its address right?): %w", name, call.Err)
	}
	return fmt.Errorf("%s: the API server answered: %w", name, err)
}

// pending says why the source has not synced yet; nil once it has.
func (s *source) pending() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case closed(s.synced):
		return nil
	case s.lastErr != nil:
		return s.lastErr
	}
	return fmt.Errorf("%s: waiting for the first list", s.name)
}

// stale is why what is known of the resource may be out of date; nil if it is not: the
// resource cannot be watched now, or nothing has come for longer than limit.
func (s *source) stale(now time.Time, limit time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	silence := now.Sub(s.heard)
	switch {
	case s.lastErr != nil:
		return s.lastErr
	case !closed(s.synced) || silence <= limit:
		return nil
	}
	return fmt.Errorf("%s: the API server has sent nothing for %s, neither over a watch nor as a list: is a proxy or a firewall between?", s.name, silence.Truncate(time.Second))
}

// silence is how long the API server has not sent anything.
func (s *source) silence(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Sub(s.heard)
}
