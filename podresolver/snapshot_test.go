package podresolver

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// podOption changes a pod that claims the address of these tests.
type podOption func(*corev1.Pod)

func claimant(name string, options ...podOption) *corev1.Pod {
	p := resolvertest.Pod(name, addr.String(), "")
	p.Status.PodIPs = []corev1.PodIP{{IP: addr.String()}, {IP: "fd00::7"}}
	for _, f := range options {
		f(p)
	}
	return p
}

func createdAgo(age time.Duration) podOption {
	return func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(time.Now().Add(-age)) }
}

// deletedIn makes a pod terminate, with a grace period that ends after some time.
func deletedIn(after time.Duration) podOption {
	return func(p *corev1.Pod) {
		end := metav1.NewTime(time.Now().Add(after))
		p.DeletionTimestamp = &end
	}
}

func phase(phase corev1.PodPhase) podOption { return func(p *corev1.Pod) { p.Status.Phase = phase } }

func uid(uid types.UID) podOption { return func(p *corev1.Pod) { p.UID = uid } }

var (
	began           = metav1.NewTime(time.Unix(1_000_000, 0))
	runningState    = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: began}}
	terminatedState = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{StartedAt: began}}
	waitingState    = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
)

func containers(states ...corev1.ContainerState) podOption {
	return func(p *corev1.Pod) {
		for _, state := range states {
			p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{State: state})
		}
	}
}

// sidecar is an init container that keeps running (KEP-753).
func sidecar(state corev1.ContainerState) podOption {
	return func(p *corev1.Pod) { p.Status.InitContainerStatuses = []corev1.ContainerStatus{{State: state}} }
}

func older(p *corev1.Pod)       { createdAgo(time.Hour)(p) }
func newer(p *corev1.Pod)       { createdAgo(time.Minute)(p) }
func hostNetwork(p *corev1.Pod) { p.Spec.HostNetwork = true }
func onlyIPs(p *corev1.Pod)     { p.Status.PodIP = "" }
func noIP(p *corev1.Pod)        { p.Status.PodIP, p.Status.PodIPs = "", nil }
func terminating(p *corev1.Pod) { deletedIn(time.Second)(p) }
func graceOver(p *corev1.Pod)   { deletedIn(0)(p) }
func malformedIP(p *corev1.Pod) { p.Status.PodIP, p.Status.PodIPs = "10.0.0", nil }

// TestAddressOwner runs each case in all orders of events.
func TestAddressOwner(t *testing.T) {
	for name, tc := range map[string]struct {
		pods  map[string][]podOption
		owner string // "" for none
		err   error
	}{
		"no pod":                             {nil, "", nil},
		"the only one":                       {map[string][]podOption{"live": nil}, "live", nil},
		"one succeeded":                      {map[string][]podOption{"done": {phase(corev1.PodSucceeded)}}, "", nil},
		"one failed":                         {map[string][]podOption{"live": nil, "done": {phase(corev1.PodFailed)}}, "live", nil},
		"one of unknown phase":               {map[string][]podOption{"lost": {phase(corev1.PodUnknown)}}, "lost", nil},
		"one pending":                        {map[string][]podOption{"early": {phase(corev1.PodPending)}}, "early", nil},
		"one on the host network":            {map[string][]podOption{"host": {hostNetwork}}, "", nil},
		"host network beside one":            {map[string][]podOption{"host": {hostNetwork}, "live": nil}, "live", nil},
		"one without an address":             {map[string][]podOption{"new": {noIP}}, "", nil},
		"by podIPs alone":                    {map[string][]podOption{"ips": {onlyIPs}}, "ips", nil},
		"malformed address":                  {map[string][]podOption{"odd": {malformedIP}}, "", nil},
		"one terminates, one stays":          {map[string][]podOption{"live": nil, "going": {terminating}}, "live", nil},
		"one terminating":                    {map[string][]podOption{"going": {terminating}}, "going", nil},
		"grace period over":                  {map[string][]podOption{"gone": {graceOver}}, "", nil},
		"one terminating, running":           {map[string][]podOption{"going": {terminating, containers(terminatedState, runningState)}}, "going", nil},
		"containers terminated":              {map[string][]podOption{"going": {terminating, containers(terminatedState, terminatedState)}}, "", nil},
		"one in back-off, terminating":       {map[string][]podOption{"going": {terminating, containers(waitingState)}}, "", nil},
		"one in back-off":                    {map[string][]podOption{"live": {containers(waitingState)}}, "live", nil},
		"containers terminated, not deleted": {map[string][]podOption{"live": {containers(terminatedState)}}, "live", nil},
		"terminating, sidecar running":       {map[string][]podOption{"going": {terminating, containers(terminatedState), sidecar(runningState)}}, "going", nil},
		"older one's containers terminated":  {map[string][]podOption{"old": {newer, terminating, containers(terminatedState)}, "new": {older}}, "new", nil},
		"two terminating":                    {map[string][]podOption{"a": {terminating, older}, "b": {terminating, newer}}, "b", nil},
		"two live":                           {map[string][]podOption{"live": nil, "other": nil}, "", ErrAmbiguousAddress},
		"two of different age":               {map[string][]podOption{"a": {older}, "b": {newer}}, "", ErrAmbiguousAddress},

		"the older terminates":             {map[string][]podOption{"old": {older, terminating}, "new": {newer}}, "new", nil},
		"the newer terminates":             {map[string][]podOption{"old": {older}, "new": {newer, terminating}}, "", ErrAmbiguousAddress},
		"the newer's grace period is over": {map[string][]podOption{"old": {older}, "new": {newer, graceOver}}, "old", nil},
		"the newer has finished":           {map[string][]podOption{"old": {older, terminating}, "new": {newer, phase(corev1.PodSucceeded)}}, "old", nil},

		// Creation times are in whole seconds.
		"same second, one terminates":     {map[string][]podOption{"a": {newer, terminating, uid("z")}, "b": {newer, uid("a")}}, "b", nil},
		"same second, both terminate":     {map[string][]podOption{"a": {newer, terminating, uid("1")}, "b": {newer, terminating, uid("2")}}, "b", nil},
		"three, the older two terminate":  {map[string][]podOption{"a": {createdAgo(3 * time.Hour), terminating}, "b": {older, terminating}, "c": {newer}}, "c", nil},
		"three, the oldest is live":       {map[string][]podOption{"a": {createdAgo(3 * time.Hour)}, "b": {older, terminating}, "c": {newer}}, "", ErrAmbiguousAddress},
		"three, the middle one is live":   {map[string][]podOption{"a": {createdAgo(3 * time.Hour), terminating}, "b": {older}, "c": {newer, terminating}}, "", ErrAmbiguousAddress},
		"three terminating":               {map[string][]podOption{"a": {createdAgo(3 * time.Hour), terminating}, "b": {older, terminating}, "c": {newer, terminating}}, "c", nil},
		"three, grace period of one over": {map[string][]podOption{"a": {createdAgo(3 * time.Hour), terminating}, "b": {older}, "c": {newer, graceOver}}, "b", nil},
		"three, one failed":               {map[string][]podOption{"a": {older, terminating}, "b": {newer}, "c": {phase(corev1.PodFailed)}}, "b", nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var pods []*corev1.Pod
				for name, options := range tc.pods {
					pods = append(pods, claimant(name, options...))
				}
				permute(pods, func(order []*corev1.Pod) {
					h := newHarness(t, Config{})
					for _, p := range order {
						h.put(p)
						h.update() // after each event: none may leave a trace
					}
					for _, at := range []netip.Addr{addr, netip.MustParseAddr("fd00::7")} {
						got := h.current.Load().byAddr[at]
						require.ErrorIs(t, got.err, tc.err)
						if tc.owner == "" {
							require.Nil(t, got.pod)
							continue
						}
						require.NotNil(t, got.pod)
						assert.Equal(t, tc.owner, got.pod.Name)
					}
				})
			})
		})
	}
}

// permute calls do with all orders of what is given.
func permute[T any](all []T, do func([]T)) {
	var place func(n int)
	order := slices.Clone(all)
	place = func(n int) {
		if n >= len(order) {
			do(order)
			return
		}
		for i := n; i < len(order); i++ {
			order[n], order[i] = order[i], order[n]
			place(n + 1)
			order[n], order[i] = order[i], order[n]
		}
	}
	place(0)
}

func TestAddressOwnerPerFamily(t *testing.T) {
	h := newHarness(t, Config{},
		resolvertest.With(claimant("a"), func(p *corev1.Pod) { p.Status.PodIPs = []corev1.PodIP{{IP: addr.String()}, {IP: "fd00::a"}} }),
		resolvertest.With(claimant("b"), func(p *corev1.Pod) {
			p.Status.PodIP = "10.244.0.8"
			p.Status.PodIPs = []corev1.PodIP{{IP: "10.244.0.8"}, {IP: "fd00::a"}}
		}))
	h.update()
	s := h.current.Load()
	require.ErrorIs(t, s.byAddr[netip.MustParseAddr("fd00::a")].err, ErrAmbiguousAddress)
	assert.Equal(t, "a", s.byAddr[addr].pod.Name)
	assert.Equal(t, "b", s.byAddr[netip.MustParseAddr("10.244.0.8")].pod.Name)
	assert.EqualValues(t, 1, h.Stats().Ambiguous)
}

func TestIPv4MappedAddress(t *testing.T) {
	h := newHarness(t, Config{}, resolvertest.Pod("a", "::ffff:"+addr.String(), ""))
	h.update()
	assert.Equal(t, "a", h.current.Load().byAddr[addr].pod.Name)
}

func TestAmbiguousAddressIsCountedOnce(t *testing.T) {
	h := newHarness(t, Config{}, resolvertest.Pod("a", addr.String(), ""), resolvertest.Pod("b", addr.String(), ""))
	h.update()
	err := h.current.Load().byAddr[addr].err
	require.ErrorContains(t, err, "shop/a")
	require.ErrorContains(t, err, "shop/b")
	h.put(resolvertest.Pod("c", "10.244.0.9", "")) // an unrelated event
	h.update()
	assert.EqualValues(t, 1, h.Stats().Ambiguous)
	h.drop(resolvertest.Pod("a", "", ""))
	h.update()
	assert.Equal(t, "b", h.current.Load().byAddr[addr].pod.Name)
	h.put(resolvertest.Pod("a", addr.String(), ""))
	h.update()
	assert.EqualValues(t, 2, h.Stats().Ambiguous)
}

func TestUpdateExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		h := newHarness(t, Config{}, claimant("a", deletedIn(20*time.Second)), claimant("b", deletedIn(10*time.Second), older))
		at := <-h.update()
		assert.Equal(t, 10*time.Second, at.Sub(begin))
		at = <-h.update()
		assert.Equal(t, 20*time.Second, at.Sub(begin))
		assert.Nil(t, h.update(), "no grace period is left")
		assert.Empty(t, h.current.Load().byAddr)
	})
}

func TestPodStarted(t *testing.T) {
	at := func(seconds int64) metav1.Time { return metav1.NewTime(time.Unix(seconds, 0)) }
	running := func(seconds int64) corev1.ContainerStatus {
		return corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at(seconds)}}}
	}
	ended := func(seconds int64) corev1.ContainerStatus {
		return corev1.ContainerStatus{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{StartedAt: at(seconds)}}}
	}
	restarting := func(seconds int64) corev1.ContainerStatus {
		return corev1.ContainerStatus{State: waitingState, LastTerminationState: ended(seconds).State}
	}
	for name, tc := range map[string]struct {
		status corev1.PodStatus
		want   int64 // 0 for none
	}{
		"none":              {corev1.PodStatus{}, 0},
		"one that waits":    {corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{State: waitingState}}}, 0},
		"the latest counts": {corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{running(5), running(7), running(6)}}, 7},
		"one that ended":    {corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{running(5), ended(8)}}, 8},
		"one in back-off":   {corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{restarting(9)}}, 9},
		"an init container": {corev1.PodStatus{InitContainerStatuses: []corev1.ContainerStatus{running(3)}, ContainerStatuses: []corev1.ContainerStatus{{State: waitingState}}}, 3},
		"one for debugging": {corev1.PodStatus{EphemeralContainerStatuses: []corev1.ContainerStatus{running(11)}, ContainerStatuses: []corev1.ContainerStatus{running(5)}}, 11},
	} {
		t.Run(name, func(t *testing.T) {
			p := resolvertest.Pod("live", addr.String(), "")
			p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses = tc.status.InitContainerStatuses, tc.status.ContainerStatuses, tc.status.EphemeralContainerStatuses
			h := newHarness(t, Config{}, p)
			h.update()
			got := h.current.Load().byAddr[addr].pod.Started
			if tc.want == 0 {
				assert.Zero(t, got)
			} else {
				assert.Equal(t, tc.want, got.Unix())
			}
		})
	}
}
