package tokencache

import (
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

const (
	refusedFor = 10 * time.Second
	backoff    = time.Second // after the first failure; doubled with each
	maxBackoff = 30 * time.Second
	// failureReset is how long after it could be asked again a failure counts no more.
	failureReset = time.Minute
	// maxFailures bounds the keys: the pod chooses the resource, so it could make up any
	// number. At most 2 KB each.
	maxFailures = 1000
)

// negativeCache remembers, of keys without a token, why their last fetch failed and
// until when the upstream is not asked again. The cache's mutex guards it.
type negativeCache struct{ byKey *simplelru.LRU[Key, failure] }

type failure struct {
	err   error // of the fetch
	class Class
	until time.Time
	count int // in a row
}

func newNegativeCache() negativeCache { return negativeCache{newLRU[Key, failure](maxFailures)} }

// get returns the failure of a key that is not to be fetched at now, else nil.
func (n negativeCache) get(key Key, now time.Time) *Failure {
	if f, ok := n.byKey.Get(key); ok && now.Before(f.until) {
		return f.at(now)
	}
	return nil
}

// record notes at now that a fetch failed.
func (n negativeCache) record(key Key, err error, now time.Time) *Failure {
	class, wait := classOf(err)
	f := failure{err: err, class: class, count: 1}
	if last, ok := n.byKey.Peek(key); ok && last.counts(now) {
		f.count += last.count
	}
	delay := min(backoff<<min(f.count-1, 10), maxBackoff)
	if class == Refused {
		delay = refusedFor
	}
	f.until = now.Add(max(delay, wait))
	n.byKey.Add(key, f)
	return f.at(now)
}

// recent is how many failures still count.
func (n negativeCache) recent(now time.Time) (count int) {
	for _, f := range n.byKey.Values() {
		if f.counts(now) {
			count++
		}
	}
	return count
}

func (n negativeCache) remove(key Key) { n.byKey.Remove(key) }

func (f failure) counts(now time.Time) bool { return now.Sub(f.until) < failureReset }

func (f failure) at(now time.Time) *Failure {
	return &Failure{Class: f.class, RetryAfter: f.until.Sub(now), Err: f.err}
}
