package main

import (
	"encoding/base64"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func token(subject string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"`+subject+`"}`)) + ".000"
}

func TestJudge(t *testing.T) {
	now := time.Now()
	const mine, before, vault = "mine", "the last pod's", "https://vault"
	own, foreign := request{resource: vault}, request{resource: vault, foreign: before}
	again := request{resource: vault, given: mine}
	good := body{Token: token(mine), Resource: vault, ExpiresOn: now.Unix() + 1}
	with := func(change func(*body)) answer {
		b := good
		change(&b)
		return answer{status: http.StatusOK, body: b}
	}
	for name, tc := range map[string]struct {
		asked    request
		got      answer
		entitled []string
		want     verdict
	}{
		"a token of its own":                 {own, answer{status: 200, body: good}, []string{mine}, right},
		"during a change":                    {own, answer{status: 200, body: good}, []string{"another", mine}, right},
		"a token of the last pod":            {own, with(func(b *body) { b.Token = token(before) }), []string{mine}, wrong},
		"a token of nobody":                  {own, with(func(b *body) { b.Token = "?" }), []string{mine, none}, wrong},
		"a token where it has no identity":   {own, answer{status: 200, body: good}, []string{none}, wrong},
		"a token for another resource":       {own, with(func(b *body) { b.Resource = "https://storage" }), []string{mine}, wrong},
		"an expired token":                   {own, with(func(b *body) { b.ExpiresOn = now.Unix() }), []string{mine}, wrong},
		"a token of an identity not its own": {foreign, with(func(b *body) { b.Token = token(before) }), []string{mine}, wrong},
		"its own where it named another":     {foreign, answer{status: 200, body: good}, []string{mine}, wrong},
		"refused what is not its own":        {foreign, answer{status: 400}, []string{mine}, denied},
		"refused while it has no identity":   {own, answer{status: 400}, []string{mine, none}, denied},
		"refused what is its own":            {own, answer{status: 400}, []string{mine}, wrong},
		"throttled":                          {own, answer{status: 429, retryAfter: "1"}, []string{mine}, throttled},
		"to come back":                       {own, answer{status: 503, retryAfter: "1"}, []string{mine}, unavailable},
		"to come back for what it has":       {again, answer{status: 503, retryAfter: "1"}, []string{mine}, wrong},
		"throttled for what it has":          {again, answer{status: 429, retryAfter: "1"}, []string{mine}, wrong},
		"to come back during a change":       {again, answer{status: 503, retryAfter: "1"}, []string{mine, before}, unavailable},
		"to come back at no time":            {own, answer{status: 503}, []string{mine}, wrong},
		"an error of another kind":           {own, answer{status: 404, retryAfter: "1"}, []string{mine}, wrong},
		"no answer":                          {own, answer{err: errors.New("connection reset")}, []string{mine}, lost},
	} {
		t.Run(name, func(t *testing.T) {
			got, text := judge(tc.asked, tc.got, tc.entitled, now)
			assert.Equal(t, tc.want, got, text)
			assert.Equal(t, got == wrong || got == lost, text != "")
		})
	}
}

func TestLately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &pod{entitled: &entitlement{}}
		change := func(to string) { require.NoError(t, p.entitled.change(to, func() error { return nil })) }
		change("mine")
		time.Sleep(time.Minute)
		asked := time.Now()
		c := client{pod: p, given: map[string]given{"vault": {"mine", asked, asked.Add(time.Hour)}, "short": {"mine", asked, asked.Add(nearEnd + time.Second)}}}
		assert.Equal(t, "mine", c.lately("vault", asked.Add(time.Second)))
		assert.Equal(t, "mine", c.lately("short", asked.Add(time.Second)))
		assert.Empty(t, c.lately("short", asked.Add(2*time.Second)), "it is about to expire")
		assert.Empty(t, c.lately("other", asked))
		assert.Empty(t, c.lately("vault", asked.Add(aMoment+time.Second)))
		time.Sleep(time.Second)
		change("another")
		change("mine")
		assert.Empty(t, c.lately("vault", time.Now()), "it had another identity meanwhile")
	})
}

func TestEntitlementDuringAChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e entitlement
		now := func() []string { return e.between(time.Now(), time.Now()) }
		require.NoError(t, e.change("old", func() error { return nil }))
		time.Sleep(time.Minute)
		assert.Equal(t, []string{"old"}, now())
		require.NoError(t, e.change("new", func() error {
			assert.Equal(t, []string{"old", "new"}, now(), "while the API server is asked")
			time.Sleep(time.Second)
			return nil
		}))
		changed := time.Now()
		time.Sleep(propagation)
		assert.Equal(t, []string{"old", "new"}, now())
		time.Sleep(time.Nanosecond)
		assert.Equal(t, []string{"new"}, now())
		assert.Equal(t, []string{"old", "new"}, e.between(changed, time.Now()), "a request that waited for its answer")
		assert.Equal(t, []string{"old"}, e.between(changed.Add(-30*time.Second), changed.Add(-2*time.Second)), "answered before")
		require.NoError(t, e.change(none, func() error { return nil }))
		time.Sleep(2 * patience)
		require.NoError(t, e.change("next", func() error { return nil }))
		assert.Len(t, e.spans, 2, "what no answer can depend on any more is forgotten")
	})
}

func TestTrend(t *testing.T) {
	var samples []sample
	for i := range 60 { // two agents, each of which grows by 6 an hour from 10
		samples = append(samples, sample{at: time.Duration(i) * time.Minute, pid: i / 30, resident: 10 + float64(i%30)/10})
	}
	value := func(s sample) float64 { return s.resident }
	first, last, perHour := trend(samples, value)
	assert.InDelta(t, 11, first, 1e-9)
	assert.InDelta(t, 12, last, 1e-9)
	assert.InDelta(t, 6, perHour, 1e-9)
	_, _, perHour = trend(samples[:2], value)
	assert.Zero(t, perHour, "too short for a slope")
}
