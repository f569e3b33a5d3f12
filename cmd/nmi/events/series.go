package events

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/types"
)

// key is what the Events of a series have in common.
type key struct {
	uid          types.UID
	reason, note string
}

// series is Events about one object, for one reason, with one note.
type series struct {
	Event
	name        string // of the Event's object
	first, last time.Time
	written     uint64 // Count that the API server has; 0 before the Event exists
	due         time.Time
	pause       time.Duration // before the next update
}

func (s *series) key() key { return key{s.Regarding.UID, s.Reason, s.Note} }

// verb is how a series is written.
type verb string

const (
	create verb = "create"
	patch  verb = "patch"
)

func (s *series) verb() verb {
	if s.written == 0 {
		return create
	}
	return patch
}

// count adds an Event to its series, or begins one. It returns false if the object has had too
// many. Another note is another series, since a note cannot be changed; a pod may have several causes
// in turn.
func (w *Writer) count(e Event, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := key{e.Regarding.UID, e.Reason, e.Note}
	s, ok := w.series.Get(k)
	switch {
	case ok && now.Sub(s.last) <= seriesEnd:
		s.Count, s.last = s.Count+e.Count, now
	case w.allowLocked(k.uid, now):
		w.series.Add(k, &series{Event: e, name: nameOf(e.Regarding.Name, now), first: now, last: now, due: now})
	default:
		return false
	}
	return true
}

// allowLocked reports whether an object may have one more series.
func (w *Writer) allowLocked(uid types.UID, now time.Time) bool {
	limiter, ok := w.objects.Get(uid)
	if !ok {
		limiter = rate.NewLimiter(rate.Every(objectInterval), objectBurst)
		w.objects.Add(uid, limiter)
	}
	return limiter.AllowN(now, 1)
}

// evicted counts a series that was never written.
func (w *Writer) evicted(_ key, s *series) {
	if s.written == 0 {
		w.dropped.Add(1)
	}
}

// maxName is of the names of objects (RFC 1123, as Kubernetes limits it).
const maxName = 253

// nameOf makes the name of an Event, as client-go does: the object's, and the time.
func nameOf(object string, at time.Time) string {
	suffix := fmt.Sprintf(".%x", at.UnixNano())
	if limit := maxName - len(suffix); len(object) > limit {
		object = strings.TrimRight(object[:limit], ".-")
	}
	return object + suffix
}

// next returns a copy of the series that is due first, and when; nil if all are written.
func (w *Writer) next() (next *series, due time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.series.Values() {
		if s.Count == s.written {
			continue
		}
		at := s.due
		if paused := w.paused[s.verb()]; paused.After(at) {
			at = paused
		}
		if next == nil || at.Before(due) {
			next, due = s, at
		}
	}
	if next != nil {
		one := *next
		next = &one
	}
	return next, due
}

// done notes what became of a series that next returned, unless another has its place.
func (w *Writer) done(written *series, change func(*series)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.series.Peek(written.key()); ok && s.name == written.name {
		change(s)
	}
}

// drop forgets a series that cannot be written.
func (w *Writer) drop(s *series) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if known, ok := w.series.Peek(s.key()); ok && known.name == s.name {
		w.series.Remove(s.key())
	}
}
