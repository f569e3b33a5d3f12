package events

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// in is an Event on a pod of another namespace.
func in(namespace string, e Event) Event {
	e.Regarding.Namespace = namespace
	return e
}

// perPod counts requests by the pod that they are about.
func perPod(requests []request) map[string]int {
	n := make(map[string]int)
	for _, r := range requests {
		n[strings.SplitN(r.path, "/", 7)[5]]++
	}
	return n
}

// What the API server answers for one namespace, be it a quota or a webhook that fails, holds up no
// other's Events.
func TestTroubleOfOneNamespace(t *testing.T) {
	for name, status := range map[string]metav1.Status{
		"a quota": {
			Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden, Details: &metav1.StatusDetails{Name: "x.1", Group: "events.k8s.io", Kind: "events"},
			Message: `events.events.k8s.io "x.1" is forbidden: exceeded quota: objects, requested: count/events.events.k8s.io=1, used: 50, limited: 50`,
		},
		"a webhook": {Code: http.StatusInternalServerError, Reason: metav1.StatusReasonInternalError, Message: "failed calling webhook"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.set(func(r request) *metav1.Status {
					if strings.Contains(r.path, "/namespaces/evil/") {
						return &status
					}
					return nil
				})
				for range 600 {
					w.Record(in("evil", event("x", "NoIdentityBound", "why")))
					w.Record(event("victim", "NoIdentityBound", "why"))
					time.Sleep(time.Second)
				}
				sent := perPod(w.sent())
				assert.GreaterOrEqual(t, sent["shop"], 4, "the Event, and its counts")
				assert.NotZero(t, sent["evil"])
				assert.NotContains(t, w.log.String(), "ClusterRole")
			})
		})
	}
}

// A pod that asks in turn for two identities that it does not have has two Events, which count all.
func TestTwoCausesInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for i := range 720 {
			w.Record(event("cart-0", "RequestedIdentityMissing", fmt.Sprint("cause ", i%2)))
			time.Sleep(5 * time.Second)
		}
		time.Sleep(maxUpdate)
		created, counts := 0, make(map[string]int32)
		for _, r := range w.sent() {
			if r.method == http.MethodPost {
				created++
			}
			counts[fmt.Sprint(r.path, r.event.Name)] = r.count()
		}
		assert.Equal(t, 2, created)
		var last []int32
		for _, n := range counts {
			last = append(last, n)
		}
		assert.Equal(t, int32(360), slices.Max(last))
		assert.Zero(t, w.Stats().Dropped)
	})
}
