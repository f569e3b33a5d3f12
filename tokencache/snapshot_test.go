package tokencache

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// transfer sends all tokens of one cache to another, as the handover does.
func transfer(t *testing.T, from, to *Cache) (stored int) {
	t.Helper()
	var received []Snapshot
	for _, s := range from.Export() {
		b, err := s.MarshalBinary()
		require.NoError(t, err)
		var r Snapshot
		require.NoError(t, r.UnmarshalBinary(b))
		received = append(received, r)
	}
	return to.Import(received)
}

func TestImportedTokensAreServedAndRefreshed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		node := &inUse{gone: make(map[netip.Addr]bool)}
		from := drawn(New(up.fetch, Config{InUse: node.ask}), 0)
		principal := numbered(1)
		principal.Principal = unique.Make(Principal{TenantID: "t", Authority: "https://login.example", SecretName: "s"})
		want := make(map[Key]*Token)
		for _, k := range []Key{key, principal, federated("cart"), {ResourceID: "/subscriptions/1", Resource: "r"}} {
			token, err := from.Get(t.Context(), k, alice)
			require.NoError(t, err)
			want[k] = token
		}
		_, err := from.Get(t.Context(), key, bob)
		require.NoError(t, err)
		time.Sleep(11 * time.Hour)
		from.Close()

		to := New(up.fetch, Config{InUse: node.ask})
		defer to.Close()
		assert.Equal(t, len(want), transfer(t, from, to))
		for k, token := range want {
			got, err := to.Get(t.Context(), k, netip.Addr{})
			require.NoError(t, err)
			assert.Equal(t, token.AccessToken, got.AccessToken)
			assert.True(t, token.ExpiresOn.Equal(got.ExpiresOn))
		}
		assert.Equal(t, Stats{Fresh: 4, Entries: 4}, to.Stats())
		node.leave(alice)
		time.Sleep(2 * time.Hour)
		assert.Equal(t, 5, up.asked(), "bob's alone is refreshed, half of its life after it was issued")
		time.Sleep(12 * time.Hour)
		synctest.Wait()
		assert.Equal(t, 1, to.Stats().Entries, "the others have expired")
	})
}

func TestImportSkipsExpiredAndOlderTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		from, to := New(up.fetch, Config{}), New(up.fetch, Config{})
		defer from.Close()
		defer to.Close()
		get(t, from)
		old := from.Export()
		time.Sleep(time.Minute)
		assert.Equal(t, "token-2", get(t, to))
		assert.Zero(t, to.Import(old), "it has a newer one")
		assert.Equal(t, "token-2", get(t, to))
		assert.Equal(t, 1, from.Import(to.Export()), "which is newer here, too")
		assert.Equal(t, "token-2", get(t, from))
		time.Sleep(time.Hour)
		synctest.Wait()
		assert.Zero(t, to.Import(old), "it has expired")
		assert.Empty(t, from.Export(), "so have these")
		assert.Zero(t, to.Import([]Snapshot{{}}))
		assert.Zero(t, to.Stats().Entries)
	})
}

// ExpiresOn is later than the token's end if the node's wall clock is behind.
func TestImportDoesNotExtendATokensLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		behind := func(context.Context, Request) (*Token, error) {
			return &Token{AccessToken: "t", ExpiresIn: 24 * time.Hour, ExpiresOn: time.Now().Add(25 * time.Hour).Round(0)}, nil
		}
		from, to := New(behind, Config{}), New((&fakeUpstream{}).fetch, Config{})
		defer from.Close()
		defer to.Close()
		get(t, from)
		time.Sleep(23 * time.Hour)
		transfer(t, from, to)
		assert.Equal(t, time.Hour, stored(to)[0].left(time.Now()))
		time.Sleep(time.Hour)
		assert.Equal(t, "token-1", get(t, to))
	})
}

func TestImportIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		from, small, owned := New(up.fetch, Config{}), New(up.fetch, Config{Size: 10}), New(up.fetch, Config{})
		defer from.Close()
		defer small.Close()
		defer owned.Close()
		for i := range 20 {
			_, err := from.Get(t.Context(), numbered(i), pod(i))
			require.NoError(t, err)
		}
		transfer(t, from, small)
		assert.Equal(t, 10, small.Stats().Entries)
		before := up.asked()
		_, err := small.Get(t.Context(), numbered(19), pod(19))
		require.NoError(t, err)
		assert.Equal(t, before, up.asked(), "the most recently used are kept")

		var many []Snapshot
		for i := range maxOwned + 50 {
			s := from.Export()[0]
			r := *s.record()
			r.Resource, r.Owner = fmt.Sprintf("r%d", i), alice
			many = append(many, newSnapshot(&r))
		}
		owned.Import(many)
		assert.Equal(t, maxOwned, owned.Stats().Entries)
	})
}

func TestTokensAreRedacted(t *testing.T) {
	up := &fakeUpstream{}
	c := New(up.fetch, Config{})
	defer c.Close()
	get(t, c)
	snapshot := c.Export()[0]
	token := (*Token)(&snapshot.record().Token)
	var buf bytes.Buffer
	for _, v := range []any{token, *token, snapshot, &snapshot, []Snapshot{snapshot}, []*Token{token}, map[string]Snapshot{"a": snapshot}, struct{ s Snapshot }{snapshot}, struct{ S Snapshot }{snapshot}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x"} {
			fmt.Fprintf(&buf, verb+"\n", v)
		}
		require.NoError(t, json.NewEncoder(&buf).Encode(v))
		slog.New(slog.NewTextHandler(&buf, nil)).Info("x", "v", v)
		slog.New(slog.NewJSONHandler(&buf, nil)).Info("x", "v", v)
	}
	assert.NotContains(t, buf.String(), "token-1")
	assert.NotContains(t, buf.String(), fmt.Sprintf("%x", "token-1"))
	var s Snapshot
	assert.EqualError(t, s.UnmarshalBinary([]byte(`{"token":{"ExpiresOn":"token-1"}}`)), "malformed token snapshot")
}
