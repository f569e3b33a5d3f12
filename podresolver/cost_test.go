package podresolver

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// filled is a resolver with n pods of two identities each, and identities of other pods.
func filled(tb testing.TB, cfg Config, n, others int) *harness {
	tb.Helper()
	h := newHarness(tb, cfg,
		resolvertest.Identity("i", resolvertest.GUID("c-1"), resolvertest.ResourceID("/r/1")), resolvertest.Binding("b", "x", "i"), resolvertest.Identity("j", resolvertest.GUID("c-2"), resolvertest.ResourceID("/r/2")), resolvertest.Binding("c", "x", "j"))
	for i := range others {
		name := fmt.Sprint("other-", i)
		h.put(resolvertest.Identity(name, resolvertest.GUID(name), ""), resolvertest.Binding(name, name, name))
	}
	next := addr
	for i := range n {
		name := fmt.Sprint("pod-", i)
		h.put(resolvertest.Pod(name, next.String(), "x"))
		if cfg.Mode == Standard {
			h.put(resolvertest.Assigned("i-"+name, name, "Assigned", resolvertest.Identity("i", resolvertest.GUID("c-1"), resolvertest.ResourceID("/r/1")), resolvertest.Binding("b", "x", "i")),
				resolvertest.Assigned("j-"+name, name, "Assigned", resolvertest.Identity("j", resolvertest.GUID("c-2"), resolvertest.ResourceID("/r/2")), resolvertest.Binding("c", "x", "j")))
		}
		next = next.Next()
	}
	h.update()
	require.Len(tb, h.current.Load().byAddr, n)
	return h
}

func TestResolveDoesNotAllocate(t *testing.T) {
	for _, mode := range []Mode{Managed, Standard} {
		for _, want := range []Selector{{}, {ClientID: resolvertest.GUID("C-2")}, {ResourceID: resolvertest.ResourceID("/R/2")}} {
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
		h.put(resolvertest.Pod("mine", "10.245.0.1", "mine"))
		h.update()
		for name, tc := range map[string]struct {
			event   func()
			decided int
		}{
			"pod added":                    {func() { h.put(resolvertest.Pod("new", "10.245.0.2", "x")) }, 1},
			"pod deleted":                  {func() { h.drop(resolvertest.Pod("new", "", "")) }, 0},
			"binding of one pod":           {func() { h.put(resolvertest.Binding("mine", "mine", "i")) }, 1},
			"binding of no pod":            {func() { h.put(resolvertest.Binding("elsewhere", "elsewhere", "i")) }, 0},
			"binding in another namespace": {func() { h.put(resolvertest.In("bank", resolvertest.Binding("mine", "mine", "i"))) }, map[Mode]int{Managed: 0, Standard: 1}[mode]},
			"identity of one pod": {func() {
				h.put(resolvertest.Binding("m", "mine", "m"))
				h.update()
				h.put(resolvertest.Identity("m", resolvertest.GUID("c-m"), ""))
			}, 1},
			"unbound identity":   {func() { h.put(resolvertest.Identity("unbound", resolvertest.GUID("c-u"), "")) }, 0},
			"unchanged identity": {func() { h.put(resolvertest.Identity("i", resolvertest.GUID("c-1"), resolvertest.ResourceID("/r/1"))) }, 0},
			"assignment to one pod": {func() {
				h.put(resolvertest.Assigned("am", "mine", "Assigned", resolvertest.Identity("i", resolvertest.GUID("c-1"), ""), nil))
			}, 1},
			"exception in another namespace": {func() { h.put(resolvertest.In("bank", resolvertest.Exception("e", map[string]string{"a": "b"}))) }, 0},
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
		h.put(resolvertest.BindingOfAge(name, "x", "i", time.Duration(i)*time.Second))
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
	h.put(resolvertest.Identity("unbound", resolvertest.GUID("c"), ""), resolvertest.Binding("elsewhere", "y", "i"), resolvertest.In("bank", resolvertest.Exception("e", nil)))
	h.put(resolvertest.Identity("i", resolvertest.GUID("c-1"), resolvertest.ResourceID("/r/1")), resolvertest.Pod("pod-0", addr.String(), "x"), resolvertest.Binding("b", "x", "i")) // unchanged
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
	pods := [2]any{resolvertest.Pod("pod-0", addr.String(), "x"), resolvertest.Pod("pod-0", addr.String(), "y")}
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		h.put(pods[n%2])
		h.update()
	}
}

// BenchmarkExplain is one pod of the status page, in a cluster of 10,000 identities: for so long, new
// pods and bindings wait.
func BenchmarkExplain(b *testing.B) {
	for label, identities := range map[string]int{"x": 2, "nothing": 0} {
		b.Run(fmt.Sprintf("%d identities", identities), func(b *testing.B) {
			h := filled(b, Config{}, 250, 10_000)
			h.put(resolvertest.Pod("asked", "10.245.0.2", label))
			h.update()
			b.ReportAllocs()
			for b.Loop() {
				d, err := h.Explain("shop", "asked", Selector{}, nil)
				if err != nil || len(d.Identities) != identities {
					b.Fatal(d, err)
				}
			}
		})
	}
}
