package podresolver

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Synced is closed once every table is filled and lookups are answered.
func (r *Resolver) Synced() <-chan struct{} { return r.synced }

func closed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// Ready returns nil once Synced is closed and as long as decisions are not too old,
// else an error which says what is awaited and what the API server last said about
// it.
func (r *Resolver) Ready() error {
	if closed(r.synced) {
		if r.expired.Load() {
			return fmt.Errorf("%w:\n%w", ErrStale, r.Stale())
		}
		return nil
	}
	var waiting []error
	for _, s := range r.sources {
		if err := s.pending(); err != nil {
			waiting = append(waiting, err)
		}
	}
	if len(waiting) == 0 {
		waiting = append(waiting, errors.New("taking the first snapshot"))
	}
	return errors.Join(waiting...)
}

// notSynced is ErrNotSynced and, in a line, what is awaited.
func (r *Resolver) notSynced() error {
	if err := r.Ready(); err != nil {
		return fmt.Errorf("%w: %s", ErrNotSynced, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return ErrNotSynced // until a moment ago
}

// Stale returns why decisions may be out of date: what the API server last said where it
// cannot be watched now, or that it says nothing. Known pods keep what they were given
// meanwhile, for as long as Config.MaxStaleness allows. It returns nil when all is well.
func (r *Resolver) Stale() error {
	var all []error
	now := time.Now()
	for _, s := range r.sources {
		all = append(all, s.stale(now, r.maxSilence()))
	}
	return errors.Join(all...)
}

// quietLimit is Config.MaxStaleness for the notes of a Resolver that has none. The API server
// ends each watch after ten minutes at most, as reflectors ask it to.
const quietLimit = 18 * time.Minute

// maxSilence is after how long without any news something is wrong.
func (r *Resolver) maxSilence() time.Duration { return cmp.Or(r.cfg.MaxStaleness, quietLimit) }

// checkStaleness goes by silence alone: an API server that answers with errors, or a proxy
// that accepts a watch and then sends nothing, brings no news either. After two thirds of
// the time everything is asked for anew.
func (r *Resolver) checkStaleness(now time.Time) {
	for _, s := range r.sources {
		s.attend(now, r.maxSilence()/3*2)
	}
	if r.cfg.MaxStaleness == 0 {
		return
	}
	expired := slices.ContainsFunc(r.sources, func(s *source) bool { return s.silence(now) > r.cfg.MaxStaleness })
	switch was := r.expired.Swap(expired); {
	case expired && !was:
		r.cfg.Logger.Error("decisions are too old; nobody gets a token until the API server sends news again", "max_staleness", r.cfg.MaxStaleness, "error", r.Stale())
	case was && !expired:
		r.cfg.Logger.Info("the API server has sent news of everything; tokens are served again")
	}
}

// Stats are counts since New, and how the watches are now.
type Stats struct {
	Addresses int    // that pods of this node hold, or more than one claims
	Ambiguous uint64 // times that an address came to have more than one owner
	Lookups   uint64 // times that the API server was asked for an address
	Found     uint64 // lookups that found a pod that the watch had not told of
	Watches   []Watch
}

// Watch is how one resource is watched.
type Watch struct {
	Resource string
	Silence  time.Duration // since the API server last sent something; it does so about once a minute
}

// Stats returns what has been counted so far.
func (r *Resolver) Stats() Stats {
	s := Stats{Addresses: len(r.current.Load().byAddr), Ambiguous: r.ambiguous.Load(), Lookups: r.asked.Load(), Found: r.found.Load()}
	now := time.Now()
	for _, source := range r.sources {
		if !closed(source.synced) {
			continue
		}
		s.Watches = append(s.Watches, Watch{source.name, source.silence(now)})
	}
	return s
}
