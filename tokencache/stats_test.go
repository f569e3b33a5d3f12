package tokencache

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestSource follows a token through its life.
func TestSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: 100 * time.Millisecond, life: 24 * time.Hour}
		c := New(up.fetch, Config{})
		defer c.Close()
		source := func() Source {
			_, source, err := c.GetAt(t.Context(), key, alice, time.Now())
			require.NoError(t, err)
			return source
		}
		joined := make(chan Source)
		go func() {
			time.Sleep(50 * time.Millisecond)
			joined <- source()
		}()
		assert.Equal(t, Upstream, source())
		assert.Equal(t, Joined, <-joined)
		assert.Equal(t, Memory, source())
		up.fail(errors.New("down")) // so that it stays due
		time.Sleep(13 * time.Hour)
		assert.Equal(t, Refreshing, source())
		time.Sleep(11*time.Hour - 2*time.Minute)
		assert.Equal(t, Refreshing, source(), "the refresh fails, and the token is served")
		_, renewal, err := c.Renew(t.Context(), key, alice, nil)
		require.Error(t, err)
		assert.Equal(t, Upstream, renewal)
	})
}

// A token that nobody asked for while it was due is refreshed for the first request.
func TestSourceOfAnExpiringToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		time.Sleep(56 * time.Minute)
		_, source, err := c.GetAt(t.Context(), key, alice, time.Now())
		require.NoError(t, err)
		assert.Equal(t, Upstream, source)
	})
}
