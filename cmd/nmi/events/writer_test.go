package events

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// request is what the Writer has sent.
type request struct {
	method, path string
	at           time.Duration // since the test began
	event        eventsv1.Event
}

func (r request) count() int32 {
	if r.event.Series == nil {
		return 1
	}
	return r.event.Series.Count
}

// world is a Writer that runs, and its API server.
type world struct {
	*Writer
	log   bytes.Buffer
	began time.Time

	mu       sync.Mutex
	requests []request
	answer   func(request) *metav1.Status // nil takes all
	hangs    chan struct{}                // requests wait until it is closed; nil for none
}

// RoundTrip answers as an API server does.
func (w *world) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	got := request{method: r.Method, path: r.URL.Path, at: time.Since(w.began).Round(time.Millisecond)}
	if err := json.Unmarshal(body, &got.event); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.requests = append(w.requests, got)
	answer, hangs := w.answer, w.hangs
	w.mu.Unlock()
	if hangs != nil {
		select {
		case <-hangs:
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	status, text := http.StatusCreated, "{}"
	if answer != nil {
		if refused := answer(got); refused != nil {
			if refused.Code == 0 {
				return nil, errors.New("connection refused")
			}
			refused.TypeMeta, refused.Status = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, "Failure"
			b, err := json.Marshal(refused)
			if err != nil {
				return nil, err
			}
			status, text = int(refused.Code), string(b)
		}
	}
	return &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(text)), Request: r}, nil
}

func (w *world) set(answer func(request) *metav1.Status) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer = answer
}

// sent returns the requests since the last call, once all goroutines wait.
func (w *world) sent() []request {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	sent := w.requests
	w.requests = nil
	return sent
}

// newWorld is for tests in a bubble.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{began: time.Now()}
	var err error
	w.Writer, err = New(&rest.Config{Host: "http://api", Transport: w}, Config{Node: "node1", Logger: slog.New(slog.NewTextHandler(&w.log, nil))})
	require.NoError(t, err)
	done := make(chan struct{})
	go func() { w.Run(t.Context()); close(done) }()
	t.Cleanup(func() { <-done }) // t's context ends before
	return w
}

func pod(name string) corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: "shop", Name: name, UID: types.UID("uid-" + name)}
}

func event(name, reason, note string) Event {
	return Event{Regarding: pod(name), Reason: reason, Action: "RequestToken", Note: note}
}

func TestEventIsCreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Record(event("cart-0", "NoIdentityBound", "why\nand what to do"))
		sent := w.sent()
		require.Len(t, sent, 1)
		assert.Equal(t, "POST", sent[0].method)
		assert.Equal(t, "/apis/events.k8s.io/v1/namespaces/shop/events", sent[0].path)
		e := sent[0].event
		assert.Equal(t, pod("cart-0"), e.Regarding)
		assert.Equal(t, "why and what to do", e.Note)
		assert.Equal(t, []string{"NoIdentityBound", "RequestToken", "Warning", "nmi", "node1"}, []string{e.Reason, e.Action, e.Type, e.ReportingController, e.ReportingInstance})
		assert.True(t, e.EventTime.Equal(&metav1.MicroTime{Time: w.began}))
		assert.Regexp(t, `^cart-0\.[0-9a-f]+$`, e.Name)
		assert.Nil(t, e.Series)
		assert.Equal(t, Stats{Written: 1}, w.Stats())
	})
}

func TestSeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for range 3600 { // an hour
			w.Record(event("cart-0", "NoIdentityBound", "why"))
			time.Sleep(time.Second)
		}
		sent := w.sent()
		require.Len(t, sent, 12)
		name := sent[0].event.Name
		var at []time.Duration
		for _, r := range sent[1:] {
			assert.Equal(t, "PATCH", r.method)
			assert.Equal(t, "/apis/events.k8s.io/v1/namespaces/shop/events/"+name, r.path)
			assert.InDelta(t, r.at.Seconds(), r.count(), 1.1)
			assert.WithinDuration(t, w.began.Add(r.at), r.event.Series.LastObservedTime.Time, time.Second)
			assert.Empty(t, r.event.Note+r.event.Reason, "a patch has nothing but the series")
			at = append(at, r.at)
		}
		assert.Equal(t, []time.Duration{5, 15, 35, 75, 155, 315, 635, 1235, 1835, 2435, 3035}, seconds(at))

		time.Sleep(maxUpdate)
		last := w.sent()
		require.Len(t, last, 1)
		assert.Equal(t, int32(3600), last[0].count(), "all are written in the end")
		time.Sleep(time.Hour)
		assert.Empty(t, w.sent())
		w.Record(event("cart-0", "NoIdentityBound", "why"))
		again := w.sent()
		require.Len(t, again, 1)
		assert.Equal(t, "POST", again[0].method, "another Event after a quiet time")
		assert.NotEqual(t, name, again[0].event.Name)
		assert.Nil(t, again[0].event.Series)
	})
}

func seconds(all []time.Duration) (out []time.Duration) {
	for _, d := range all {
		out = append(out, d/time.Second)
	}
	return out
}

func TestAnotherNote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for i := range 100 {
			w.Record(event("cart-0", "EntraRefused", fmt.Sprint("cause ", i)))
		}
		w.Record(event("cart-1", "EntraRefused", "cause"))
		time.Sleep(time.Second)
		byPod := make(map[string]int)
		for _, r := range w.sent() {
			assert.Equal(t, "POST", r.method)
			byPod[r.event.Regarding.Name]++
		}
		// The causes of one moment share an Event.
		assert.LessOrEqual(t, byPod["cart-0"], objectBurst)
		assert.Equal(t, 1, byPod["cart-1"], "another pod's are not held back")

		time.Sleep(10 * time.Minute)
		w.sent()
		w.Record(event("cart-0", "EntraRefused", "something else"))
		sent := w.sent()
		require.Len(t, sent, 1)
		assert.Equal(t, "something else", sent[0].event.Note)
	})
}

func forbidden(v string) *metav1.Status {
	return &metav1.Status{Code: 403, Reason: metav1.StatusReasonForbidden, Message: `events.events.k8s.io is forbidden: User "nmi" cannot ` + v + ` resource "events"`}
}

func TestWithoutTheRight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.set(func(request) *metav1.Status { return forbidden("create") })
		for i := range 3600 {
			w.Record(event(fmt.Sprint("cart-", i), "NoIdentityBound", "why"))
			time.Sleep(time.Second)
		}
		assert.Len(t, w.sent(), 7, "one in ten minutes")
		assert.Equal(t, 1, strings.Count(w.log.String(), "\n"), w.log.String())
		assert.Contains(t, w.log.String(), `cannot create resource`)
		assert.Contains(t, w.log.String(), `deploy/manifests/account.yaml`)
		assert.Equal(t, uint64(3600-maxSeries), w.Stats().Dropped)
		assert.Equal(t, maxSeries, w.series.Len())

		w.set(nil) // somebody gives it
		time.Sleep(forbiddenRetry)
		assert.NotEmpty(t, w.sent())
	})
}

func TestWithoutTheRightToPatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.set(func(r request) *metav1.Status {
			if r.method == "PATCH" {
				return forbidden("patch")
			}
			return nil
		})
		for i := range 600 {
			w.Record(event(fmt.Sprint("cart-", i%2), "NoIdentityBound", "why"))
			time.Sleep(time.Second)
		}
		assert.Len(t, w.sent(), 3, "both are created")
		assert.Equal(t, 1, strings.Count(w.log.String(), "\n"), w.log.String())
		assert.Contains(t, w.log.String(), `cannot patch resource`)
	})
}

func TestFailures(t *testing.T) {
	for name, tc := range map[string]struct {
		answer  *metav1.Status
		retried bool
	}{
		"no connection":            {&metav1.Status{}, true},
		"overloaded":               {&metav1.Status{Code: 429, Reason: metav1.StatusReasonTooManyRequests}, true},
		"internal error":           {&metav1.Status{Code: 500, Reason: metav1.StatusReasonInternalError}, true},
		"expired token":            {&metav1.Status{Code: 401, Reason: metav1.StatusReasonUnauthorized}, true},
		"it exists":                {&metav1.Status{Code: 409, Reason: metav1.StatusReasonAlreadyExists}, false},
		"invalid":                  {&metav1.Status{Code: 422, Reason: metav1.StatusReasonInvalid}, false},
		"no namespace":             {&metav1.Status{Code: 404, Reason: metav1.StatusReasonNotFound}, false},
		"the namespace terminates": {&metav1.Status{Code: 403, Reason: metav1.StatusReasonForbidden, Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.set(func(request) *metav1.Status { return tc.answer.DeepCopy() })
				w.Record(event("cart-0", "NoIdentityBound", "why"))
				time.Sleep(30 * time.Second)
				if sent := w.sent(); tc.retried {
					assert.GreaterOrEqual(t, len(sent), 5)
					assert.LessOrEqual(t, len(sent), 60) // client-go tries itself, too
				} else {
					assert.Len(t, sent, 1)
				}
				assert.Empty(t, w.log.String())
				w.set(nil)
				w.Record(event("cart-1", "NoIdentityBound", "why"))
				time.Sleep(time.Minute)
				sent := w.sent()
				assert.Len(t, sent, map[bool]int{true: 2, false: 1}[tc.retried])
			})
		})
	}
}

func TestExpiredEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.set(func(r request) *metav1.Status {
			if r.method == "PATCH" {
				return &metav1.Status{Code: 404, Reason: metav1.StatusReasonNotFound}
			}
			return nil
		})
		w.Record(event("cart-0", "NoIdentityBound", "why"))
		w.sent()
		time.Sleep(time.Second)
		w.Record(event("cart-0", "NoIdentityBound", "why"))
		time.Sleep(firstUpdate)
		sent := w.sent()
		require.Len(t, sent, 2)
		assert.Equal(t, "POST", sent[1].method)
		assert.Equal(t, int32(2), sent[1].count())
		assert.Equal(t, "why", sent[1].event.Note)
	})
}

// An API server that does not answer, and any number of pods, keep nobody waiting.
func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.hangs = make(chan struct{})
		const pods = 10_000
		for i := range pods { // at one moment of the bubble's clock
			w.Record(event(fmt.Sprint("cart-", i), "NoIdentityBound", strings.Repeat("x", 10_000)))
		}
		assert.Zero(t, time.Since(w.began))
		assert.Equal(t, maxSeries, w.series.Len())
		assert.Equal(t, maxSeries, w.objects.Len())
		assert.Equal(t, uint64(pods-maxSeries), w.Stats().Dropped)
		close(w.hangs)
		time.Sleep(10 * time.Second)
		sent := w.sent()
		assert.InDelta(t, writesAtOnce+10*writesPerSecond, len(sent), 2, "the rate of the node")
		assert.LessOrEqual(t, len(sent[0].event.Note), maxNote)
	})
}

func TestNamesOfEvents(t *testing.T) {
	at := time.Unix(1, 0)
	assert.Equal(t, "cart-0.3b9aca00", nameOf("cart-0", at))
	long := nameOf(strings.Repeat("a", 243)+"-.-"+strings.Repeat("b", 7), at)
	assert.Equal(t, strings.Repeat("a", 243)+".3b9aca00", long)
	assert.LessOrEqual(t, len(long), maxName)
}
