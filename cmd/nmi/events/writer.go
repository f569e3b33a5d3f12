// Package events writes Kubernetes Events (events.k8s.io/v1): on a pod why its requests are not
// served, and on the node which rules cannot be written.
//
// The life of an Event:
//
//  1. Record counts it, and never waits. An Event about the same object for the same reason joins
//     the last one's series; others begin a series, of which each object gets a few.
//  2. Run creates the Event at once, and writes how often it has happened since after 5 seconds,
//     then after ever longer, up to 10 minutes. All writes share one rate.
//  3. After a quarter of an hour without another, the next one is a new Event.
//
// The recorder of client-go (tools/events) would do most of this. But it starts a goroutine for
// each Event that waits for the API server, without a bound, keeps every series, says each
// refusal again, and brings the typed clients of all of Kubernetes into the program.
package events

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

const (
	// maxSeries bounds the series in memory, at some 2 KiB each.
	maxSeries = 256
	// Each object gets objectBurst series at once, and one more in objectInterval.
	objectBurst    = 5
	objectInterval = time.Minute
	// The rate of all writes of this node. A cluster has thousands of nodes.
	writesPerSecond, writesAtOnce = 1, 20

	// The pause before a series is written again; it doubles.
	firstUpdate = 5 * time.Second
	maxUpdate   = 10 * time.Minute
	// seriesEnd is how long a series goes on after its last occurrence: longer than maxUpdate, so
	// that all are written. API servers keep Events for an hour by default (--event-ttl).
	seriesEnd = 15 * time.Minute

	writeTimeout = 10 * time.Second
	// The pause after a write that the API server could not take; it doubles.
	firstRetry = time.Second
	maxRetry   = time.Minute
	// forbiddenRetry is the pause after one that this account may not make.
	forbiddenRetry = 10 * time.Minute
)

// Event is something that happened to an object, once or several times.
type Event struct {
	Regarding corev1.ObjectReference // with its UID
	Reason    string                 // a word that stays the same
	Action    string                 // what the agent did or failed to do, in one word
	Note      string                 // for people; no secret, since whoever may read the object's namespace reads it
	Count     uint64                 // how often; 0 means once
}

// Config configures a Writer. All fields are required.
type Config struct {
	Node   string
	Logger *slog.Logger
}

// Writer writes Events. It is safe for concurrent use.
type Writer struct {
	cfg    Config
	client *rest.RESTClient
	limit  *rate.Limiter // of writes
	wake   chan struct{} // holds a value when there is something new to write

	mu      sync.Mutex // guards all following fields
	series  *simplelru.LRU[key, *series]
	objects *simplelru.LRU[types.UID, *rate.Limiter]
	paused  map[verb]time.Time // until when, because it is forbidden
	told    map[verb]bool      // that it is

	written, dropped atomic.Uint64
}

// New returns a Writer that sends nothing before Run.
func New(config *rest.Config, cfg Config) (*Writer, error) {
	client, err := newClient(config)
	if err != nil {
		return nil, err
	}
	w := &Writer{
		cfg: cfg, client: client, limit: rate.NewLimiter(writesPerSecond, writesAtOnce), wake: make(chan struct{}, 1),
		paused: make(map[verb]time.Time), told: make(map[verb]bool),
	}
	if w.series, err = simplelru.NewLRU(maxSeries, w.evicted); err != nil {
		return nil, err
	}
	w.objects, err = simplelru.NewLRU[types.UID, *rate.Limiter](maxSeries, nil)
	return w, err
}

// Stats are counts since New.
type Stats struct {
	Written uint64 // creations and updates
	Dropped uint64 // Events for which there was no room, no rate or no right
}

// Stats returns the counts so far.
func (w *Writer) Stats() Stats { return Stats{w.written.Load(), w.dropped.Load()} }

// Record has an Event written, unless there are too many. It does not wait.
func (w *Writer) Record(e Event) {
	e.Count = max(e.Count, 1)
	e.Note = clean(e.Note, maxNote)
	if !w.count(e, time.Now()) {
		w.dropped.Add(1)
		return
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Run writes Events until ctx ends; what is not written then is lost, but for the log.
func (w *Writer) Run(ctx context.Context) {
	retry := firstRetry
	for {
		next, due := w.next()
		if pause := time.Until(due); next == nil || pause > 0 {
			if !w.sleep(ctx, next != nil, pause) {
				return
			}
			continue
		}
		if w.limit.Wait(ctx) != nil {
			return
		}
		if w.write(ctx, next) {
			retry = firstRetry
			continue
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			return
		}
		retry = min(2*retry, maxRetry)
	}
}

// sleep waits for something new to write, or for the pause if there is one. It returns false if
// ctx ends first.
func (w *Writer) sleep(ctx context.Context, bounded bool, pause time.Duration) bool {
	var over <-chan time.Time
	if bounded {
		over = time.After(pause)
	}
	select {
	case <-w.wake:
	case <-over:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
