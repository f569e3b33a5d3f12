package podresolver

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// filled is a resolver that knows n pods of two identities each, and as many
// identities of others.
func filled(tb testing.TB, cfg Config, n, others int) *harness {
	tb.Helper()
	world := newHarness(tb, cfg,
		identity("i", guid("c-1"), path("/r/1")), binding("b", "x", "i", 0), identity("j", guid("c-2"), path("/r/2")), binding("c", "x", "j", 0))
	for i := range others {
		name := fmt.Sprint("other-", i)
		world.put(identity(name, guid(name), ""), binding(name, name, name, 0))
	}
	next := addr
	for i := range n {
		name := fmt.Sprint("pod-", i)
		world.put(newPod(name, next.String(), "x"))
		if cfg.Mode == Standard {
			world.put(assigned("i-"+name, name, "Assigned", identity("i", guid("c-1"), path("/r/1")), binding("b", "x", "i", 0)),
				assigned("j-"+name, name, "Assigned", identity("j", guid("c-2"), path("/r/2")), binding("c", "x", "j", 0)))
		}
		next = next.Next()
	}
	world.update()
	require.Len(tb, world.current.Load().byAddr, n)
	return world
}

func TestResolveAndDecideAllocateNothing(t *testing.T) {
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

// TestAnEventTouchesItsOwnPodsOnly: the others keep the very decision they had.
func TestAnEventTouchesItsOwnPodsOnly(t *testing.T) {
	for _, mode := range []Mode{Managed, Standard} {
		world := filled(t, Config{Mode: mode}, 250, 10)
		world.put(newPod("mine", "10.245.0.1", "mine"))
		world.update()
		for name, tc := range map[string]struct {
			event   func()
			decided int
		}{
			"a pod comes":                    {func() { world.put(newPod("new", "10.245.0.2", "x")) }, 1},
			"a pod goes":                     {func() { world.drop(newPod("new", "", "")) }, 0},
			"a binding for one":              {func() { world.put(binding("mine", "mine", "i", 0)) }, 1},
			"a binding for nobody here":      {func() { world.put(binding("elsewhere", "elsewhere", "i", 0)) }, 0},
			"a binding in another namespace": {func() { world.put(in("bank", binding("mine", "mine", "i", 0))) }, map[Mode]int{Managed: 0, Standard: 1}[mode]},
			"an identity of one": {func() {
				world.put(binding("m", "mine", "m", 0))
				world.update()
				world.put(identity("m", guid("c-m"), ""))
			}, 1},
			"an identity of nobody":             {func() { world.put(identity("unbound", guid("c-u"), "")) }, 0},
			"an identity that is as it was":     {func() { world.put(identity("i", guid("c-1"), path("/r/1"))) }, 0},
			"an assignment to one":              {func() { world.put(assigned("am", "mine", "Assigned", identity("i", guid("c-1"), ""), nil)) }, 1},
			"an exception in another namespace": {func() { world.put(in("bank", exception("e", map[string]string{"a": "b"}))) }, 0},
		} {
			before := make(map[*Pod]bool)
			world.update()
			for _, o := range world.current.Load().byAddr {
				before[o.pod] = true
			}
			held := world.current.Load().byAddr
			tc.event()
			world.update()
			anew := 0
			for addr, o := range world.current.Load().byAddr {
				if !before[o.pod] {
					anew++
					assert.NotEqual(t, "pod-0", o.pod.Name, "%s: %s", name, held[addr].pod)
				}
			}
			assert.LessOrEqual(t, anew, tc.decided, "%s, %s", mode, name)
		}
	}
}

// TestAStormBeforeADecisionIsOneDecision: an event wakes the deciding goroutine,
// and those that follow until it has looked do so no more.
func TestAStormBeforeADecisionIsOneDecision(t *testing.T) {
	world := filled(t, Config{}, 250, 0)
	<-world.objects.wake
	for i := range 1000 {
		name := fmt.Sprint("n", i)
		world.put(binding(name, "x", "i", time.Duration(i)*time.Second))
	}
	require.Len(t, world.objects.wake, 1)
	<-world.objects.wake
	assert.Len(t, world.objects.dirty, 250)
	world.update()
	assert.Empty(t, world.objects.dirty)
	assert.Equal(t, "n999", world.current.Load().byAddr[addr].pod.identities[0].Binding, "the oldest")
}

func TestWhatBearsOnNobodyWakesNobody(t *testing.T) {
	world := filled(t, Config{}, 10, 0)
	<-world.objects.wake
	world.put(identity("unbound", guid("c"), ""), binding("elsewhere", "y", "i", 0), in("bank", exception("e", nil)))
	world.put(identity("i", guid("c-1"), path("/r/1")), newPod("pod-0", addr.String(), "x"), binding("b", "x", "i", 0)) // as they are
	assert.Empty(t, world.objects.wake)
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

// BenchmarkPodEvent is a change of one pod among 250, in a cluster of 10,000
// identities, to the snapshot that shows it.
func BenchmarkPodEvent(b *testing.B) {
	world := filled(b, Config{}, 250, 10_000)
	pods := [2]any{newPod("pod-0", addr.String(), "x"), newPod("pod-0", addr.String(), "y")}
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		world.put(pods[n%2])
		world.update()
	}
}
