package histogram

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestRecord(t *testing.T) {
	var h Histogram
	for _, d := range []time.Duration{0, 50 * time.Microsecond, 51 * time.Microsecond, 30 * time.Second, time.Minute} {
		h.Record(d)
	}
	s := h.Snapshot()
	assert.True(t, slices.IsSorted(Bounds()))
	assert.Len(t, s.Buckets, len(Bounds())+1)
	assert.Equal(t, uint64(2), s.Buckets[0], "a bound is part of its bucket")
	assert.Equal(t, uint64(1), s.Buckets[1])
	assert.Equal(t, uint64(1), s.Buckets[len(s.Buckets)-2])
	assert.Equal(t, uint64(1), s.Buckets[len(s.Buckets)-1])
	assert.Equal(t, uint64(5), s.Count())
	assert.Equal(t, 90*time.Second+101*time.Microsecond, s.Sum)
	assert.Equal(t, uint64(10), s.Add(s).Count())
	assert.Equal(t, 2*s.Sum, s.Add(s).Sum)
}

func TestRecordConcurrently(t *testing.T) {
	var h Histogram
	var recording sync.WaitGroup
	for range 8 {
		recording.Go(func() {
			for i := range 1000 {
				h.Record(time.Duration(i) * time.Millisecond)
			}
		})
	}
	recording.Wait()
	assert.Equal(t, uint64(8000), h.Snapshot().Count())
	assert.Zero(t, testing.AllocsPerRun(100, func() { h.Record(time.Second) }))
}

func BenchmarkRecord(b *testing.B) {
	var h Histogram
	for b.Loop() {
		h.Record(70 * time.Microsecond)
	}
}
