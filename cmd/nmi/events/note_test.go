package events

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
)

func denial(reason, text, fix string) proxy.Denial {
	return proxy.Denial{Pod: &podresolver.Pod{Namespace: "shop", Name: "cart-0", UID: "uid-cart-0"}, Reason: reason, Text: text, Fix: fix, Count: 3}
}

func TestNotes(t *testing.T) {
	for want, d := range map[string]proxy.Denial{
		`no identity for this pod: it has no label "aadpodidbinding". Fix: label it`: denial("", `pod shop/cart-0: no identity for this pod: it has no label "aadpodidbinding"`, "label it"),
		"identity shop/cart: Entra answered 401 invalid_client: AADSTS7000215: Invalid client secret provided. Fix: correct it": denial("",
			"pod shop/cart-0, identity shop/cart: Entra answered 401 invalid_client: AADSTS7000215: Invalid client secret provided", "correct it"),
		"IMDS answered a[2Jb":   denial("", "IMDS answered a\x1b[2J\u202eb\xff", ""),
		"several live pods … x": denial("", "several live pods … x", ""),
	} {
		assert.Equal(t, want, noteOf(d))
	}
	long := noteOf(denial("", strings.Repeat("ü", 2000), strings.Repeat("fix ", 100)+"end"))
	assert.LessOrEqual(t, len(long), maxNote)
	assert.True(t, utf8.ValidString(long))
	assert.True(t, strings.HasSuffix(long, "fix end"), "what to do is not cut")
}

func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for _, passing := range []string{
			podresolver.PodUnknown, podresolver.PodUnconfirmed, podresolver.PodDataStale, podresolver.NotSynced, proxy.RequestInvalid,
			proxy.IMDSUnavailable, proxy.EntraUnavailable, proxy.Throttled, proxy.TooManyWaiting, "",
		} {
			w.Refused(denial(passing, "text", "fix"))
		}
		assert.Empty(t, w.sent())
		w.Refused(denial(proxy.IdentityUnknownToIMDS, "text", "fix"))
		sent := w.sent()
		require.Len(t, sent, 1)
		assert.Equal(t, pod("cart-0"), sent[0].event.Regarding)
		assert.Equal(t, "text. Fix: fix", sent[0].event.Note)
		assert.Equal(t, int32(3), sent[0].count())
		assert.Equal(t, Stats{Written: 1}, w.Stats())
	})
}

func TestWatchRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var status atomic.Pointer[iptables.Status]
		status.Store(&iptables.Status{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go w.WatchRules(ctx, func() iptables.Status { return *status.Load() })
		time.Sleep(time.Second) // between two checks
		failing := &iptables.Status{Err: errors.Join(fmt.Errorf("no routing: %w", unix.EPERM), errors.New("no chain")), InPlace: map[string]bool{"guard": false}}
		for range 10 { // another program holds the lock for a while, again and again
			status.Store(failing)
			time.Sleep(rulesGrace - 2*rulesCheck)
			status.Store(&iptables.Status{})
			time.Sleep(rulesCheck)
		}
		assert.Empty(t, w.sent())
		status.Store(failing)
		time.Sleep(rulesGrace + 2*rulesCheck)
		sent := w.sent()
		require.Len(t, sent, 1)
		assert.Equal(t, "/apis/events.k8s.io/v1/namespaces/default/events", sent[0].path)
		e := sent[0].event
		assert.Equal(t, corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "node1", UID: "node1"}, e.Regarding)
		assert.Equal(t, []string{"RulesRefused", "WriteRules", "no routing: operation not permitted no chain. Fix: " + iptables.Fix(iptables.RulesRefused)}, []string{e.Reason, e.Action, e.Note})
		time.Sleep(10 * time.Minute)
		sent = w.sent()
		assert.Equal(t, "PATCH", sent[0].method)
		assert.InDelta(t, 10, sent[len(sent)-1].count(), 5)
		status.Store(&iptables.Status{})
		time.Sleep(time.Hour)
		w.sent()
		time.Sleep(time.Hour)
		assert.Empty(t, w.sent())
	})
}
