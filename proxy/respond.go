package proxy

import (
	"encoding/json"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/tokencache"
)

const contentType = "application/json; charset=utf-8"

// contentTypeHeader is shared by all responses, which do not change it.
var contentTypeHeader = []string{contentType}

// response is an http.ResponseWriter that closes the connection where it must, by the state
// of the server when the header is written: that may be long after the request came.
//
// It drops informational responses. HTTP/1.0 clients must not get any (RFC 9110, 15.2),
// net/http writes "100 Continue" itself, when the body is read, and IMDS sends none.
// ReverseProxy also clears the header after one, Connection included.
type response struct {
	http.ResponseWriter
	draining *atomic.Bool
	last     bool // on its connection
}

// WriteHeader implements http.ResponseWriter.
func (w *response) WriteHeader(status int) {
	if status < http.StatusOK {
		return
	}
	if w.last || w.draining.Load() {
		w.Header().Set("Connection", "close")
	}
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// writeToken writes a token, or an array of it and others if there are any, as the
// old NMI did for service principals with auxiliary tenants.
func writeToken(w http.ResponseWriter, t *tokencache.Token, others []*tokencache.Token, now time.Time) {
	buffer := buffers.Get().(*[]byte) //nolint:errcheck // nothing else is ever put there
	b := (*buffer)[:0]
	if len(others) == 0 {
		b = appendToken(b, t, now)
	} else {
		b = appendToken(append(b, '['), t, now)
		for _, other := range others {
			b = appendToken(append(b, ','), other, now)
		}
		b = append(b, ']')
	}
	writeJSON(w, http.StatusOK, b)
	if cap(b) <= maxBuffer {
		*buffer = b
		buffers.Put(buffer)
	}
}

// appendToken appends the eight fields in IMDS's order, all of them strings: some
// SDKs cannot read numbers, none needs them.
func appendToken(b []byte, t *tokencache.Token, now time.Time) []byte {
	b = append(b, `{"access_token":"`...)
	b = append(b, t.AccessToken...) // a b64token: nothing to escape
	b = append(b, `","client_id":`...)
	b = appendString(b, t.ClientID)
	b = append(b, `,"expires_in":`...)
	b = appendSeconds(b, t.ExpiresOn.Unix()-now.Unix())
	b = append(b, `,"expires_on":`...)
	b = appendSeconds(b, t.ExpiresOn.Unix())
	b = append(b, `,"ext_expires_in":`...)
	b = appendSeconds(b, t.ExtExpiresOn.Unix()-now.Unix())
	b = append(b, `,"not_before":`...)
	b = appendSeconds(b, t.NotBefore.Unix())
	b = append(b, `,"resource":`...)
	b = appendString(b, t.Resource)
	b = append(b, `,"token_type":`...)
	b = appendString(b, t.TokenType)
	return append(b, '}')
}

// buffers are for token answers. Larger ones than any real token needs are not
// kept.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

const maxBuffer = 64 << 10

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h["Content-Type"] = contentTypeHeader
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // fails when the client has gone, who cannot be told
}

// appendSeconds appends n as a JSON string; less than no time is none.
func appendSeconds(b []byte, n int64) []byte {
	b = append(b, '"')
	b = strconv.AppendInt(b, max(n, 0), 10)
	return append(b, '"')
}

// appendString appends s as a JSON string. Tokens and IDs have nothing to
// escape, so that is the short way.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' {
			quoted, err := json.Marshal(s)
			if err != nil { // a string cannot fail
				panic(err)
			}
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
