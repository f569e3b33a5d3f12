package tokencache

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestHeldBy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := drawn(New(up.fetch, Config{}), 0)
		defer c.Close()
		get := func(k Key) { _, err := c.Get(t.Context(), k, alice); require.NoError(t, err) }
		start := time.Now()
		get(numbered(1))
		time.Sleep(time.Hour)
		up.mu.Lock()
		up.life = time.Hour
		up.mu.Unlock()
		get(numbered(2))
		_, err := c.Get(t.Context(), numbered(3), bob)
		require.NoError(t, err)

		held, total := c.HeldBy(alice, 10)
		assert.Equal(t, 2, total)
		assert.Equal(t, []Held{
			{Key: numbered(2), ExpiresOn: start.Add(2 * time.Hour), NextRefresh: start.Add(2*time.Hour - expiryWindow)},
			{Key: numbered(1), ExpiresOn: start.Add(24 * time.Hour), NextRefresh: start.Add(12 * time.Hour)},
		}, held)
		assert.NotContains(t, fmt.Sprintf("%+v", held), "token-")
		held, total = c.HeldBy(alice, 1)
		assert.Equal(t, 2, total)
		assert.Equal(t, numbered(2), held[0].Key)
		assert.Len(t, held, 1)

		up.mu.Lock()
		up.err = errors.New("upstream is down")
		up.mu.Unlock()
		time.Sleep(56 * time.Minute)
		get(numbered(2))
		held, _ = c.HeldBy(alice, 10)
		assert.Equal(t, 1, held[0].FailedRefreshes)
		time.Sleep(4 * time.Minute)
		held, total = c.HeldBy(alice, 10)
		assert.Equal(t, 1, total, "the other has expired")
		assert.Equal(t, numbered(1), held[0].Key)
		_, total = c.HeldBy(netip.MustParseAddr("10.0.0.99"), 10)
		assert.Zero(t, total)
	})
}
