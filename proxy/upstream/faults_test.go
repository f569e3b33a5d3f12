package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

// always is more often than any fetch tries.
func always(f imdstest.Fault) []imdstest.Fault {
	all := make([]imdstest.Fault, 100)
	for i := range all {
		all[i] = f
	}
	return all
}

func once(f imdstest.Fault) []imdstest.Fault { return []imdstest.Fault{f} }

// field replaces a field of a token; nil drops it.
func field(name string, value any) imdstest.Fault {
	return imdstest.Fault{Edit: func(fields map[string]any) {
		fields[name] = value
		if value == nil {
			delete(fields, name)
		}
	}}
}

func numbers(fields map[string]any) {
	for name, value := range fields {
		if text, ok := value.(string); ok && (strings.HasPrefix(name, "expires_") || strings.HasSuffix(name, "_expires_in") || name == "not_before") {
			fields[name] = json.Number(text)
		}
	}
}

// patience is what a fetch has here. No try begins just then.
const patience = 9500 * time.Millisecond

// outcome is what a fetch comes to.
type outcome struct {
	class    tokencache.Class // of the error
	text     string           // in the error; "" means that there is a token
	requests int
	took     time.Duration // give or take what is random in it, 0.3 s a try
	wait     time.Duration // that the error asks for
	pause    time.Duration // of all requests to IMDS
}

func TestFaults(t *testing.T) {
	const (
		unavailable = tokencache.Unavailable
		refused     = tokencache.Refused
		throttled   = tokencache.Throttled
		s           = time.Second
		secret      = `{"access_token":"eyJ-secret","client_id":"eyJ-secret","resource":"eyJ-secret","expires_on":"eyJ-secret"`
	)
	type fault = imdstest.Fault
	for name, tc := range map[string]struct {
		faults []fault
		want   outcome
	}{
		"none":              {nil, outcome{requests: 1}},
		"404 once":          {once(fault{Status: 404, Body: `{"error":"Not Found"}`}), outcome{requests: 2}},
		"408 once":          {once(fault{Status: 408}), outcome{requests: 2}},
		"410 once":          {once(fault{Status: 410}), outcome{requests: 2, took: 2 * s}},
		"500 once":          {once(fault{Status: 500, Body: "<html>not now</html>", Type: "text/html"}), outcome{requests: 2, took: s}},
		"503, again in 2 s": {once(fault{Status: 503, RetryAfter: "2"}), outcome{requests: 2, took: 2 * s}},
		"502, 504":          {[]fault{{Status: 502}, {Status: 504}}, outcome{requests: 3, took: 2 * s}},
		"400":               {once(fault{Status: 400, Body: `{"error":"invalid_resource","error_description":"AADSTS50001: x"}`}), outcome{refused, "IMDS answered 400 invalid_resource: AADSTS50001: x", 1, 0, 0, 0}},
		"401":               {once(fault{Status: 401}), outcome{refused, "IMDS answered 401 Unauthorized", 1, 0, 0, 0}},
		"403 of a firewall": {once(fault{Status: 403, Body: "<html>", Type: "text/html"}), outcome{refused, "IMDS answered 403 Forbidden", 1, 0, 0, 0}},
		"403 of a proxy":    {once(fault{Status: 403}), outcome{unavailable, "a proxy before IMDS answered 403 (Forbidden); if this node has the Metadata Security Protocol (GuestProxyAgent), allow this agent's process", 1, 0, 0, 0}},
		"429":               {once(fault{Status: 429}), outcome{throttled, "IMDS answered 429", 1, 0, s, s}},
		"429 for 7 s":       {once(fault{Status: 429, RetryAfter: "7", Body: "{}"}), outcome{throttled, "429", 1, 0, 7 * s, 7 * s}},
		"429 for a day":     {once(fault{Status: 429, RetryAfter: "86400"}), outcome{throttled, "429", 1, 0, time.Hour, time.Hour}},
		"429, cut":          {once(fault{Status: 429, RetryAfter: "3", Body: `{"error":"x"}`, Cut: true}), outcome{throttled, "429", 1, 0, 3 * s, 3 * s}},
		"503 for a minute":  {once(fault{Status: 503, RetryAfter: "60"}), outcome{unavailable, "IMDS answered 503", 1, 0, time.Minute, 0}},
		"500 for ever":      {always(fault{Status: 500}), outcome{unavailable, "after 10 tries, the last of which failed: IMDS answered 500", 10, patience, 0, 0}},
		"410 for ever":      {always(fault{Status: 410}), outcome{unavailable, "IMDS answered 410", 5, patience, goneWait, 0}},
		"hangs once":        {once(fault{Hang: true}), outcome{requests: 2, took: 5 * s}},
		"hangs":             {always(fault{Hang: true}), outcome{unavailable, "after 2 tries, the last of which failed: no answer within 5s", 2, patience, 0, 0}},
		"slow body":         {once(fault{Slow: s}), outcome{requests: 1, took: s}},
		"too slow a body":   {once(fault{Slow: 10 * s}), outcome{requests: 2, took: 5 * s}},
		"cut body once":     {once(fault{Cut: true}), outcome{requests: 2}},
		"cut bodies":        {append(always(fault{Cut: true, Slow: 4 * s}), fault{}), outcome{unavailable, "unexpected EOF", 3, patience, 0, 0}},
		"reset once":        {once(fault{Reset: true}), outcome{requests: 2}},
		"reset":             {always(fault{Reset: true, Delay: 4 * s}), outcome{unavailable, "EOF", 3, patience, 0, 0}},
		"not JSON":          {once(fault{Status: 200, Body: secret}), outcome{unavailable, "malformed JSON at byte", 1, 0, 0, 0}},
		"HTML":              {once(fault{Status: 200, Body: "<html>eyJ-secret</html>", Type: "text/html"}), outcome{unavailable, "malformed JSON at byte", 1, 0, 0, 0}},
		"nothing":           {once(fault{Status: 200}), outcome{unavailable, "malformed JSON at byte", 1, 0, 0, 0}},
		"204":               {once(fault{Status: 204}), outcome{unavailable, "IMDS answered 204 No Content", 1, 0, 0, 0}},
		"text for a number": {once(fault{Status: 200, Body: secret + "}"}), outcome{unavailable, "malformed number: want whole seconds", 1, 0, 0, 0}},
		"compressed":        {once(fault{Gzip: true}), outcome{unavailable, "malformed JSON at byte", 1, 0, 0, 0}},
		"huge":              {once(fault{Status: 200, Body: secret + "}" + strings.Repeat(" ", 2<<20)}), outcome{unavailable, "longer than 1048576 bytes", 1, 0, 0, 0}},
		"huge and broken":   {once(fault{Status: 500, Body: strings.Repeat("x", 2<<20)}), outcome{requests: 2, took: s}},
		"numbers":           {once(fault{Edit: numbers}), outcome{requests: 1}},
		"another resource":  {once(field("resource", "eyJ-other")), outcome{unavailable, "wrong resource: want", 1, 0, 0, 0}},
		"another client_id": {once(field("client_id", "eyJ-other")), outcome{unavailable, "wrong client_id: want", 1, 0, 0, 0}},
		"no client_id":      {once(field("client_id", nil)), outcome{unavailable, "no client_id", 1, 0, 0, 0}},
		"an expired token":  {once(field("expires_in", "0")), outcome{unavailable, "implausible expires_in 0", 1, 0, 0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { checkFault(t, tc.faults, tc.want) })
		})
	}
}

func checkFault(t *testing.T, faults []imdstest.Fault, want outcome) {
	t.Helper()
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	imds.Inject(faults...)
	u, stop := inMemory(t, imds)
	defer stop()
	slots := counted(u)
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	token, err := u.Token(ctx, asking(key))
	random := time.Millisecond + time.Duration(want.requests-1)*300*time.Millisecond
	assert.InDelta(t, want.took, time.Since(begin), float64(random))
	synctest.Wait() // until IMDS knows of all that has come
	assert.Equal(t, want.requests, imds.Requests())
	slots.check(t, want.requests)
	assert.Equal(t, want.pause, max(time.Until(u.PausedUntil()), 0))
	if want.text == "" {
		require.NoError(t, err)
		assert.Equal(t, known.ClientID, imdstest.Subject(token.AccessToken))
		assert.Equal(t, 24*time.Hour, token.ExpiresIn)
		return
	}
	assert.Nil(t, token)
	require.ErrorContains(t, err, want.text)
	assert.NotContains(t, err.Error(), "eyJ", "no token in an error")
	var answer *Error
	if errors.As(err, &answer) {
		assert.Equal(t, want.class, answer.Class())
		assert.Equal(t, want.wait, answer.Wait())
	} else {
		assert.Equal(t, tokencache.Unavailable, want.class, "the class of errors that do not say theirs")
	}
	if ended := ctx.Err() != nil; assert.Equal(t, want.took == patience, ended) && ended {
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}
}
