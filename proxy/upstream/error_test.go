package upstream

import (
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/tokencache"
)

func TestErrorClassAndWait(t *testing.T) {
	for _, tc := range []struct {
		status int
		class  tokencache.Class
		wait   time.Duration
	}{
		{204, tokencache.Unavailable, 0},
		{302, tokencache.Unavailable, 0},
		{400, tokencache.Refused, 0},
		{401, tokencache.Refused, 0},
		{403, tokencache.Refused, 0},
		{404, tokencache.Unavailable, 0},
		{405, tokencache.Refused, 0},
		{408, tokencache.Unavailable, 0},
		{410, tokencache.Unavailable, goneWait},
		{413, tokencache.Refused, 0},
		{429, tokencache.Throttled, time.Second},
		{500, tokencache.Unavailable, 0},
		{503, tokencache.Unavailable, 0},
		{599, tokencache.Unavailable, 0},
	} {
		e := &Error{Source: "IMDS", Status: tc.status}
		assert.Equal(t, tc.class, e.Class(), tc.status)
		assert.Equal(t, tc.wait, e.Wait(), tc.status)
		assert.Contains(t, e.Error(), "IMDS answered")
		e.RetryAfter = time.Minute
		assert.Equal(t, time.Minute, e.Wait(), "Retry-After takes precedence")
	}
	for _, source := range []string{sourceIMDS, sourceEntra} {
		assert.Equal(t, tokencache.Unavailable, (&Error{Source: source, Status: 421}).Class(), "from a proxy on the way")
		assert.Equal(t, tokencache.Unavailable, (&Error{Source: source, Status: 403, empty: true}).Class(), "from a proxy on the way")
	}
	assert.Equal(t, tokencache.Unavailable, (&Error{Source: sourceEntra, Status: 403}).Class(), "from a proxy on the way")
	assert.Equal(t, tokencache.Refused, (&Error{Source: sourceEntra, Status: 401, Code: "invalid_client"}).Class())
	assert.Equal(t, tokencache.Unavailable, (&Error{Source: sourceEntra, Status: 400, Code: "temporarily_unavailable"}).Class())
	assert.Equal(t, tokencache.Unavailable, (&Error{Source: sourceEntra, Status: 400, Code: "server_error"}).Class())
}

func TestParseRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "5": 5 * time.Second, "-5": 0, "99999999": time.Hour, "9223372036854775807": time.Hour, "-9223372037": 0, "soon": 0,
		"Sat, 21 Nov 2026 10:00:30 GMT": 30 * time.Second, "Sat, 21 Nov 2026 12:00:00 GMT": time.Hour, "Sat, 21 Nov 2026 09:00:00 GMT": 0,
	} {
		assert.Equal(t, want, parseRetryAfter(value, now), value)
	}
}

func FuzzNewError(f *testing.F) {
	f.Add(400, "", []byte(`{"error":"invalid_request","error_description":"Identity not found"}`))
	f.Add(429, "7", []byte(`{"error":"invalid_request"}`))
	f.Add(503, "Sat, 21 Nov 2026 10:00:30 GMT", []byte("<html>\xff"))
	f.Add(400, "-9223372036854775808", []byte(`{"error":"\ud800","error_description":["x"]}`))
	f.Add(500, "9223372036854775808", []byte(`{"error":"`+strings.Repeat("x", 200)+`"}`))
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, status int, retryAfter string, body []byte) {
		e := newError(status, retryAfter, body, now)
		switch {
		case e.Status != status,
			e.RetryAfter < 0, e.RetryAfter > time.Hour, e.Wait() < e.RetryAfter, e.Wait() > time.Hour,
			len(e.Code) > 100, len(e.Description) > maxDescription, !utf8.ValidString(e.Error()),
			(e.Class() == tokencache.Throttled) != (status == http.StatusTooManyRequests),
			e.Class() == tokencache.Refused && (status < 400 || status > 499 || retriable(status)):
			t.Fatalf("%d, %q, %q: %#v", status, retryAfter, body, e)
		}
	})
}
