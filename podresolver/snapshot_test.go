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
)

// What befalls a pod that claims the address of these tests.
type fate func(*corev1.Pod)

func claimant(name string, fates ...fate) *corev1.Pod {
	p := newPod(name, addr.String(), "")
	p.Status.PodIPs = []corev1.PodIP{{IP: addr.String()}, {IP: "fd00::7"}}
	for _, f := range fates {
		f(p)
	}
	return p
}

func born(age time.Duration) fate {
	return func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(time.Now().Add(-age)) }
}

// ending is in its grace, which ends after some time, or has ended.
func ending(after time.Duration) fate {
	return func(p *corev1.Pod) {
		end := metav1.NewTime(time.Now().Add(after))
		p.DeletionTimestamp = &end
	}
}

func phase(phase corev1.PodPhase) fate { return func(p *corev1.Pod) { p.Status.Phase = phase } }

func uid(uid types.UID) fate { return func(p *corev1.Pod) { p.UID = uid } }

var (
	began           = metav1.NewTime(time.Unix(1_000_000, 0))
	runningState    = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: began}}
	terminatedState = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{StartedAt: began}}
	waitingState    = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
)

func containers(states ...corev1.ContainerState) fate {
	return func(p *corev1.Pod) {
		for _, state := range states {
			p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{State: state})
		}
	}
}

// sidecar is an init container that goes on running (KEP-753).
func sidecar(state corev1.ContainerState) fate {
	return func(p *corev1.Pod) { p.Status.InitContainerStatuses = []corev1.ContainerStatus{{State: state}} }
}

func elder(p *corev1.Pod)   { born(time.Hour)(p) }
func junior(p *corev1.Pod)  { born(time.Minute)(p) }
func host(p *corev1.Pod)    { p.Spec.HostNetwork = true }
func onlyIPs(p *corev1.Pod) { p.Status.PodIP = "" }
func noIPs(p *corev1.Pod)   { p.Status.PodIP, p.Status.PodIPs = "", nil }
func going(p *corev1.Pod)   { ending(time.Second)(p) }
func gone(p *corev1.Pod)    { ending(0)(p) }
func oddIP(p *corev1.Pod)   { p.Status.PodIP, p.Status.PodIPs = "10.0.0", nil }

// TestWhoOwnsAnAddress tries each case in all orders of events.
func TestWhoOwnsAnAddress(t *testing.T) {
	for name, tc := range map[string]struct {
		pods  map[string][]fate
		owner string // "" for none
		err   error
	}{
		"nobody":                                         {nil, "", nil},
		"the only one":                                   {map[string][]fate{"live": nil}, "live", nil},
		"one that has succeeded":                         {map[string][]fate{"done": {phase(corev1.PodSucceeded)}}, "", nil},
		"one that has failed":                            {map[string][]fate{"live": nil, "done": {phase(corev1.PodFailed)}}, "live", nil},
		"one whose phase is lost":                        {map[string][]fate{"lost": {phase(corev1.PodUnknown)}}, "lost", nil},
		"one that is yet pending":                        {map[string][]fate{"early": {phase(corev1.PodPending)}}, "early", nil},
		"one on the host network":                        {map[string][]fate{"host": {host}}, "", nil},
		"host network beside one":                        {map[string][]fate{"host": {host}, "live": nil}, "live", nil},
		"one that is on its way":                         {map[string][]fate{"new": {noIPs}}, "", nil},
		"by podIPs alone":                                {map[string][]fate{"ips": {onlyIPs}}, "ips", nil},
		"an address that is none":                        {map[string][]fate{"odd": {oddIP}}, "", nil},
		"one that goes, one stays":                       {map[string][]fate{"live": nil, "going": {going}}, "live", nil},
		"one in its grace":                               {map[string][]fate{"going": {going}}, "going", nil},
		"one past its grace":                             {map[string][]fate{"gone": {gone}}, "", nil},
		"one in its grace, running":                      {map[string][]fate{"going": {going, containers(terminatedState, runningState)}}, "going", nil},
		"one whose containers ended":                     {map[string][]fate{"going": {going, containers(terminatedState, terminatedState)}}, "", nil},
		"one that restarts, and goes":                    {map[string][]fate{"going": {going, containers(waitingState)}}, "", nil},
		"one that restarts, and stays":                   {map[string][]fate{"live": {containers(waitingState)}}, "live", nil},
		"one that ended, and stays":                      {map[string][]fate{"live": {containers(terminatedState)}}, "live", nil},
		"one that goes, with a sidecar":                  {map[string][]fate{"going": {going, containers(terminatedState), sidecar(runningState)}}, "going", nil},
		"one whose containers ended, and one that stays": {map[string][]fate{"old": {junior, going, containers(terminatedState)}, "new": {elder}}, "new", nil},
		"two in their grace":                             {map[string][]fate{"a": {going, elder}, "b": {going, junior}}, "b", nil},
		"two that stay":                                  {map[string][]fate{"live": nil, "other": nil}, "", ErrAmbiguousAddress},
		"two of different age":                           {map[string][]fate{"a": {elder}, "b": {junior}}, "", ErrAmbiguousAddress},

		"the elder goes, the younger stays": {map[string][]fate{"old": {elder, going}, "new": {junior}}, "new", nil},
		"the younger goes, the elder stays": {map[string][]fate{"old": {elder}, "new": {junior, going}}, "", ErrAmbiguousAddress},
		"the younger is past its grace":     {map[string][]fate{"old": {elder}, "new": {junior, gone}}, "old", nil},
		"the younger has ended":             {map[string][]fate{"old": {elder, going}, "new": {junior, phase(corev1.PodSucceeded)}}, "old", nil},

		// Creation is stored in seconds.
		"of one second, one goes":           {map[string][]fate{"a": {junior, going, uid("z")}, "b": {junior, uid("a")}}, "b", nil},
		"of one second, both go":            {map[string][]fate{"a": {junior, going, uid("1")}, "b": {junior, going, uid("2")}}, "b", nil},
		"three, all but the youngest go":    {map[string][]fate{"a": {born(3 * time.Hour), going}, "b": {elder, going}, "c": {junior}}, "c", nil},
		"three, the eldest stays":           {map[string][]fate{"a": {born(3 * time.Hour)}, "b": {elder, going}, "c": {junior}}, "", ErrAmbiguousAddress},
		"three, one in the middle stays":    {map[string][]fate{"a": {born(3 * time.Hour), going}, "b": {elder}, "c": {junior, going}}, "", ErrAmbiguousAddress},
		"three that go":                     {map[string][]fate{"a": {born(3 * time.Hour), going}, "b": {elder, going}, "c": {junior, going}}, "c", nil},
		"three, of which one is past it":    {map[string][]fate{"a": {born(3 * time.Hour), going}, "b": {elder}, "c": {junior, gone}}, "b", nil},
		"three, of which one has none left": {map[string][]fate{"a": {elder, going}, "b": {junior}, "c": {phase(corev1.PodFailed)}}, "b", nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var pods []*corev1.Pod
				for name, fates := range tc.pods {
					pods = append(pods, claimant(name, fates...))
				}
				permute(pods, func(order []*corev1.Pod) {
					world := newHarness(t, Config{})
					for _, p := range order {
						world.put(p)
						world.update() // each on its own: none must leave a trace
					}
					for _, at := range []netip.Addr{addr, netip.MustParseAddr("fd00::7")} {
						got := world.current.Load().byAddr[at]
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

func TestTheOwnerOfAnAddressIsThatOfOneFamilyOnly(t *testing.T) {
	world := newHarness(t, Config{},
		with(claimant("a"), func(p *corev1.Pod) { p.Status.PodIPs = []corev1.PodIP{{IP: addr.String()}, {IP: "fd00::a"}} }),
		with(claimant("b"), func(p *corev1.Pod) {
			p.Status.PodIP = "10.244.0.8"
			p.Status.PodIPs = []corev1.PodIP{{IP: "10.244.0.8"}, {IP: "fd00::a"}}
		}))
	world.update()
	s := world.current.Load()
	require.ErrorIs(t, s.byAddr[netip.MustParseAddr("fd00::a")].err, ErrAmbiguousAddress)
	assert.Equal(t, "a", s.byAddr[addr].pod.Name)
	assert.Equal(t, "b", s.byAddr[netip.MustParseAddr("10.244.0.8")].pod.Name)
	assert.EqualValues(t, 1, world.Stats().Ambiguous)
}

func TestAMappedAddressIsTheSameAsThePlainOne(t *testing.T) {
	world := newHarness(t, Config{}, newPod("a", "::ffff:"+addr.String(), ""))
	world.update()
	assert.Equal(t, "a", world.current.Load().byAddr[addr].pod.Name)
}

func TestAnAddressUsedAgainIsCountedAsAmbiguousOnce(t *testing.T) {
	world := newHarness(t, Config{}, newPod("a", addr.String(), ""), newPod("b", addr.String(), ""))
	world.update()
	err := world.current.Load().byAddr[addr].err
	require.ErrorContains(t, err, "shop/a")
	require.ErrorContains(t, err, "shop/b")
	world.put(newPod("c", "10.244.0.9", "")) // news that have nothing to do with it
	world.update()
	assert.EqualValues(t, 1, world.Stats().Ambiguous)
	world.drop(newPod("a", "", ""))
	world.update()
	assert.Equal(t, "b", world.current.Load().byAddr[addr].pod.Name)
	world.put(newPod("a", addr.String(), ""))
	world.update()
	assert.EqualValues(t, 2, world.Stats().Ambiguous)
}

func TestTheTimeToDecideAgainIsWhenTheFirstGraceEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		world := newHarness(t, Config{}, claimant("a", ending(20*time.Second)), claimant("b", ending(10*time.Second), elder))
		at := <-world.update()
		assert.Equal(t, 10*time.Second, at.Sub(begin))
		at = <-world.update()
		assert.Equal(t, 20*time.Second, at.Sub(begin))
		assert.Nil(t, world.update(), "nothing changes by time alone any more")
		assert.Empty(t, world.current.Load().byAddr)
	})
}

func TestWhenThePodsContainersStarted(t *testing.T) {
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
			p := newPod("live", addr.String(), "")
			p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses = tc.status.InitContainerStatuses, tc.status.ContainerStatuses, tc.status.EphemeralContainerStatuses
			world := newHarness(t, Config{}, p)
			world.update()
			got := world.current.Load().byAddr[addr].pod.Started
			if tc.want == 0 {
				assert.Zero(t, got)
			} else {
				assert.Equal(t, tc.want, got.Unix())
			}
		})
	}
}
