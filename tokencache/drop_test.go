package tokencache

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// federated is the key of a service account's token.
func federated(name string) Key {
	k := key
	k.Principal = unique.Make(Principal{TenantID: "t", ServiceAccount: ServiceAccount{Namespace: "shop", Name: name, UID: "u"}})
	return k
}

func TestDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		defer c.Close()
		cart, report := federated("cart"), federated("report")
		require.NotEqual(t, cart.String(), report.String())
		for _, k := range []Key{key, cart, report} {
			_, err := c.Get(t.Context(), k, alice)
			require.NoError(t, err)
		}
		failing := cart
		failing.Resource = "another"
		up.fail(classed{class: Refused})
		_, err := c.Get(t.Context(), failing, alice)
		require.Error(t, err)
		up.fail(nil)
		assert.Equal(t, 1, c.Drop(func(k Key) bool { return k.Principal == cart.Principal }))
		assert.Len(t, stored(c), 2)
		asked := up.asked()
		for _, k := range []Key{key, report} {
			_, err := c.Get(t.Context(), k, alice)
			require.NoError(t, err)
		}
		assert.Equal(t, asked, up.asked())
		_, err = c.Get(t.Context(), failing, alice)
		require.NoError(t, err, "its failure is forgotten, too")
	})
}

// TestDropDuringFetch: those that wait get the token, and nobody keeps it.
func TestDropDuringFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		cart := federated("cart")
		var waiting sync.WaitGroup
		wait := func(caller netip.Addr) {
			waiting.Go(func() {
				_, err := c.Get(t.Context(), cart, caller)
				assert.NoError(t, err)
			})
			synctest.Wait()
		}
		wait(alice)
		assert.Zero(t, c.Drop(func(Key) bool { return true }))
		waiting.Wait()
		assert.Empty(t, stored(c))

		wait(alice)
		c.Drop(func(Key) bool { return true })
		wait(bob) // who is entitled to it again
		waiting.Wait()
		assert.Len(t, stored(c), 1)

		up.fail(errors.New("no"))
		c.Drop(func(Key) bool { return true })
		_, err := c.Get(t.Context(), cart, alice)
		require.Error(t, err)
	})
}
