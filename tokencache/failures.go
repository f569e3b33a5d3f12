package tokencache

import (
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

const (
	refusedFor = 10 * time.Second
	backoff    = time.Second // after the first failure; doubled with each
	maxBackoff = 30 * time.Second
	// forgotten is how long after it could be asked again a failure counts no more.
	forgotten = time.Minute
	// maxFailures is how many keys without a token are remembered: the pod chooses
	// the resource, so it could make up any number. At most 2 KB each.
	maxFailures = 1000
)

// failures remembers, of keys that have no token, why not and until when the
// upstream is not asked again. It is safe for concurrent use.
type failures struct{ byKey *lru.Cache[Key, failure] }

type failure struct {
	err   error // of the fetch
	class Class
	until time.Time
	count int // in a row
}

func newFailures() failures {
	byKey, err := lru.New[Key, failure](maxFailures)
	if err != nil { // only for a size below 1
		panic(err)
	}
	return failures{byKey}
}

// recall returns the failure that stands at now, nil if there is none.
func (f failures) recall(key Key, now time.Time) *Failure {
	if known, ok := f.byKey.Get(key); ok && now.Before(known.until) {
		return known.told(now)
	}
	return nil
}

// remember notes at now that a fetch failed.
func (f failures) remember(key Key, err error, now time.Time) *Failure {
	class, wait := classOf(err)
	known := failure{err: err, class: class, count: 1}
	if last, ok := f.byKey.Peek(key); ok && last.counts(now) {
		known.count += last.count
	}
	delay := min(backoff<<min(known.count-1, 10), maxBackoff)
	if class == Refused {
		delay = refusedFor
	}
	known.until = now.Add(max(delay, wait))
	f.byKey.Add(key, known)
	return known.told(now)
}

// standing is how many failures are not forgotten.
func (f failures) standing(now time.Time) (n int) {
	for _, known := range f.byKey.Values() {
		if known.counts(now) {
			n++
		}
	}
	return n
}

func (f failures) forget(key Key) { f.byKey.Remove(key) }

func (f failure) counts(now time.Time) bool { return now.Sub(f.until) < forgotten }

func (f failure) told(now time.Time) *Failure {
	return &Failure{Class: f.class, RetryAfter: f.until.Sub(now), Err: f.err}
}
