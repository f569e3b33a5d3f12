package podresolver

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// filled is a resolver with n pods of two identities each, and identities of other pods.
func filled(tb testing.TB, cfg Config, n, others int) *harness {
	tb.Helper()
	h := newHarness(tb, cfg,
		identity("i", guid("c-1"), path("/r/1")), binding("b", "x", "i", 0), identity("j", guid("c-2"), path("/r/2")), binding("c", "x", "j", 0))
	for i := range others {
		name := fmt.Sprint("other-", i)
		h.put(identity(name, guid(name), ""), binding(name, name, name, 0))
	}
	next := addr
	for i := range n {
		name := fmt.Sprint("pod-", i)
		h.put(newPod(name, next.String(), "x"))
		if cfg.Mode == Standard {
			h.put(assigned("i-"+name, name, "Assigned", identity("i", guid("c-1"), path("/r/1")), binding("b", "x", "i", 0)),
				assigned("j-"+name, name, "Assigned", identity("j", guid("c-2"), path("/r/2")), binding("c", "x", "j", 0)))
		}
		next = next.Next()
	}
	h.update()
	require.Len(tb, h.current.Load().byAddr, n)
	return h
}

func TestResolveDoesNotAllocate(t *testing.T) {
	for _, mode := range []Mode{Managed, Standard} {
		for _, want := range []Selector{{}, {ClientID: guid("C-2")}, {ResourceID: path("/R/2")}} {
			r, ctx := filled(t, Config{Mode: mode}, 250, 0), t.Context()
			assert.Zero(t, testing.AllocsPerRun(1000, func() {
				pod, err := r.Resolve(ctx, addr)
				if err != nil {
					t.Fatal(err)
				}
				if _, err = r.Identity(ctx, addr, pod, want); err != nil {
					t.Fatal(err)
				}
			}), "%s %+v", mode, want)
		}
	}
}

// TestEventDecidesAffectedPodsOnly: other pods keep the same *Pod.
func TestEventDecidesAffectedPodsOnly(t *testing.T) {
	for _, mode := range []Mode{Managed, Standard} {
		h := filled(t, Config{Mode: mode}, 250, 10)
		h.put(newPod("mine", "10.245.0.1", "mine"))
		h.update()
		for name, tc := range map[string]struct {
			event   func()
			decided int
		}{
			"pod added":                    {func() { h.put(newPod("new", "10.245.0.2", "x")) }, 1},
			"pod deleted":                  {func() { h.drop(newPod("new", "", "")) }, 0},
			"binding of one pod":           {func() { h.put(binding("mine", "mine", "i", 0)) }, 1},
			"binding of no pod":            {func() { h.put(binding("elsewhere", "elsewhere", "i", 0)) }, 0},
			"binding in another namespace": {func() { h.put(in("bank", binding("mine", "mine", "i", 0))) }, map[Mode]int{Managed: 0, Standard: 1}[mode]},
			"identity of one pod": {func() {
				h.put(binding("m", "mine", "m", 0))
				h.update()
				h.put(identity("m", guid("c-m"), ""))
			}, 1},
			"unbound identity":               {func() { h.put(identity("unbound", guid("c-u"), "")) }, 0},
			"unchanged identity":             {func() { h.put(identity("i", guid("c-1"), path("/r/1"))) }, 0},
			"assignment to one pod":          {func() { h.put(assigned("am", "mine", "Assigned", identity("i", guid("c-1"), ""), nil)) }, 1},
			"exception in another namespace": {func() { h.put(in("bank", exception("e", map[string]string{"a": "b"}))) }, 0},
		} {
			before := make(map[*Pod]bool)
			h.update()
			for _, o := range h.current.Load().byAddr {
				before[o.pod] = true
			}
			held := h.current.Load().byAddr
			tc.event()
			h.update()
			anew := 0
			for addr, o := range h.current.Load().byAddr {
				if !before[o.pod] {
					anew++
					assert.NotEqual(t, "pod-0", o.pod.Name, "%s: %s", name, held[addr].pod)
				}
			}
			assert.LessOrEqual(t, anew, tc.decided, "%s, %s", mode, name)
		}
	}
}

// TestBurstOfEventsIsOneUpdate: events wake the deciding goroutine once, until it has looked.
func TestBurstOfEventsIsOneUpdate(t *testing.T) {
	h := filled(t, Config{}, 250, 0)
	<-h.objects.wake
	for i := range 1000 {
		name := fmt.Sprint("n", i)
		h.put(binding(name, "x", "i", time.Duration(i)*time.Second))
	}
	require.Len(t, h.objects.wake, 1)
	<-h.objects.wake
	assert.Len(t, h.objects.dirty, 250)
	h.update()
	assert.Empty(t, h.objects.dirty)
	assert.Equal(t, "n999", h.current.Load().byAddr[addr].pod.identities[0].Binding, "the oldest")
}

func TestUnrelatedEventsDoNotWake(t *testing.T) {
	h := filled(t, Config{}, 10, 0)
	<-h.objects.wake
	h.put(identity("unbound", guid("c"), ""), binding("elsewhere", "y", "i", 0), in("bank", exception("e", nil)))
	h.put(identity("i", guid("c-1"), path("/r/1")), newPod("pod-0", addr.String(), "x"), binding("b", "x", "i", 0)) // unchanged
	assert.Empty(t, h.objects.wake)
}

func BenchmarkResolve(b *testing.B) {
	r, ctx := filled(b, Config{}, 250, 0), b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Resolve(ctx, addr); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIdentity(b *testing.B) {
	r, ctx := filled(b, Config{}, 250, 0), b.Context()
	pod, err := r.Resolve(ctx, addr)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Identity(ctx, addr, pod, Selector{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPodEvent is a change of one of 250 pods in a cluster of 10,000 identities, up to the
// published snapshot.
func BenchmarkPodEvent(b *testing.B) {
	h := filled(b, Config{}, 250, 10_000)
	pods := [2]any{newPod("pod-0", addr.String(), "x"), newPod("pod-0", addr.String(), "y")}
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		h.put(pods[n%2])
		h.update()
	}
}
