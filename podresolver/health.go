package podresolver

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Synced is closed once all resources are listed and requests can be decided.
func (r *Resolver) Synced() <-chan struct{} { return r.synced }

func closed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// Ready returns nil once Synced is closed, unless the data is stale. Otherwise its error names
// each resource that is missing, and the last error of the API server.
func (r *Resolver) Ready() error {
	if closed(r.synced) {
		if r.expired.Load() {
			return fmt.Errorf("%w:\n%w", ErrStale, r.Stale())
		}
		return nil
	}
	var waiting []error
	for _, w := range r.watchers {
		if err := w.syncError(); err != nil {
			waiting = append(waiting, err)
		}
	}
	if len(waiting) == 0 {
		waiting = append(waiting, errors.New("computing the first snapshot"))
	}
	return errors.Join(waiting...)
}

// notSynced is ErrNotSynced with the error of Ready in one line.
func (r *Resolver) notSynced() error {
	if err := r.Ready(); err != nil {
		return fmt.Errorf("%w: %s", ErrNotSynced, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return ErrNotSynced // it has synced just now
}

// Stale returns why decisions may be out of date, nil if they are not: the last error of each
// resource that cannot be watched, or that the API server has been silent. Known pods keep
// their identities meanwhile, for as long as Config.MaxStaleness allows.
func (r *Resolver) Stale() error {
	var all []error
	now := time.Now()
	for _, w := range r.watchers {
		all = append(all, w.staleError(now, r.staleLimit()))
	}
	return errors.Join(all...)
}

// defaultStaleLimit is when Stale reports silence without Config.MaxStaleness. The API server
// ends each watch after ten minutes at most, because reflectors ask for that.
const defaultStaleLimit = 18 * time.Minute

// staleLimit is how long a resource may be silent before something is wrong.
func (r *Resolver) staleLimit() time.Duration { return cmp.Or(r.cfg.MaxStaleness, defaultStaleLimit) }

// checkStaleness looks at silence alone: an API server that returns errors, or a proxy that
// accepts a watch and forwards nothing, sends no objects either. After two thirds of the limit
// a resource is listed again.
func (r *Resolver) checkStaleness(now time.Time) {
	for _, w := range r.watchers {
		w.relistIfStale(now, r.staleLimit()/3*2)
	}
	if r.cfg.MaxStaleness == 0 {
		return
	}
	expired := slices.ContainsFunc(r.watchers, func(w *watcher) bool { return w.staleFor(now) > r.cfg.MaxStaleness })
	switch was := r.expired.Swap(expired); {
	case expired && !was:
		r.cfg.Logger.Error("pod and identity data is stale; refusing all token requests until the API server responds", "max_staleness", r.cfg.MaxStaleness, "error", r.Stale())
	case was && !expired:
		r.cfg.Logger.Info("pod and identity data is up to date; serving tokens again")
	}
}
