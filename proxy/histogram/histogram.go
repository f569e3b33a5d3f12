// Package histogram counts durations in buckets, for packages that know nothing of metrics.
// To record takes two atomic additions, no lock and no memory.
package histogram

import (
	"sync/atomic"
	"time"
)

// bounds are the upper bounds of the buckets: a token from memory takes some 50 µs, one from
// IMDS 0.1 s, and no request much more than 30 s. All histograms share them.
var bounds = [...]time.Duration{
	50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 10 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second, 30 * time.Second,
}

// Bounds returns the upper bounds of the buckets, each part of its bucket. The last bucket has
// none.
func Bounds() []time.Duration { return append([]time.Duration(nil), bounds[:]...) }

// Histogram counts durations. The zero value is ready for use, by any number of goroutines.
type Histogram struct {
	buckets [len(bounds) + 1]atomic.Uint64
	sum     atomic.Int64 // in nanoseconds
}

// Record counts a duration.
func (h *Histogram) Record(d time.Duration) {
	i := 0
	for i < len(bounds) && d > bounds[i] { // nearly all are in the first few
		i++
	}
	h.buckets[i].Add(1)
	h.sum.Add(int64(d))
}

// Snapshot is what a Histogram has counted.
type Snapshot struct {
	Buckets [len(bounds) + 1]uint64 // see Bounds; each without those before it
	Sum     time.Duration
}

// Snapshot returns what has been counted so far. Durations that are recorded meanwhile may be in
// one of its fields only.
func (h *Histogram) Snapshot() (s Snapshot) {
	for i := range h.buckets {
		s.Buckets[i] = h.buckets[i].Load()
	}
	s.Sum = time.Duration(h.sum.Load())
	return s
}

// Count is how many durations have been counted.
func (s Snapshot) Count() (n uint64) {
	for _, inBucket := range s.Buckets {
		n += inBucket
	}
	return n
}

// Add returns the counts of both.
func (s Snapshot) Add(other Snapshot) Snapshot {
	for i, n := range other.Buckets {
		s.Buckets[i] += n
	}
	s.Sum += other.Sum
	return s
}
