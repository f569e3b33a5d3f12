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

// response is an http.ResponseWriter that closes the connection if the server is draining
// when the header is written, which may be long after the request arrived, or if the response
// must be the last one in any case.
//
// It drops informational responses. HTTP/1.0 clients must not get any (RFC 9110, 15.2),
// net/http writes "100 Continue" itself when the body is read, and IMDS sends none.
type response struct {
	http.ResponseWriter
	draining *atomic.Bool
	last     bool // on its connection

	// For Stats.
	status int    // once it is known
	source string // of the token; "" without one
}

// WriteHeader implements http.ResponseWriter.
func (w *response) WriteHeader(status int) {
	if status < http.StatusOK {
		return
	}
	w.status = status
	if w.last || w.draining.Load() {
		w.Header().Set("Connection", "close")
	}
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// writeToken writes a token; if there are tokens of auxiliary tenants, an array of it and
// those, as the old NMI did.
func writeToken(w http.ResponseWriter, t *tokencache.Token, auxiliary []*tokencache.Token, now int64) {
	buffer := buffers.Get().(*[]byte) //nolint:errcheck // nothing else is put there
	b := (*buffer)[:0]
	if len(auxiliary) == 0 {
		b = appendToken(b, t, now)
	} else {
		b = appendToken(append(b, '['), t, now)
		for _, other := range auxiliary {
			b = appendToken(append(b, ','), other, now)
		}
		b = append(b, ']')
	}
	writeJSON(w, http.StatusOK, b)
	*buffer = b
	putBuffer(buffer)
}

func putBuffer(buffer *[]byte) {
	if cap(*buffer) <= maxBuffer {
		buffers.Put(buffer)
	}
}

// appendToken appends the eight fields in IMDS's order, all of them strings: some
// SDKs cannot read numbers, none needs them. now is in Unix time.
func appendToken(b []byte, t *tokencache.Token, now int64) []byte {
	b = append(b, `{"access_token":"`...)
	b = append(b, t.AccessToken...) // a b64token: nothing to escape
	b = append(b, `","client_id":`...)
	b = appendString(b, t.ClientID)
	b = append(b, `,"expires_in":"`...)
	b = appendSeconds(b, t.ExpiresOn.Unix()-now)
	b = append(b, `","expires_on":"`...)
	b = appendSeconds(b, t.ExpiresOn.Unix())
	b = append(b, `","ext_expires_in":"`...)
	b = appendSeconds(b, t.ExtExpiresOn.Unix()-now)
	b = append(b, `","not_before":"`...)
	b = appendSeconds(b, t.NotBefore.Unix())
	b = append(b, `","resource":`...)
	b = appendString(b, t.Resource)
	b = append(b, `,"token_type":`...)
	b = appendString(b, t.TokenType)
	return append(b, '}')
}

// buffers are for responses with tokens. Those that are larger than any real token needs are
// not kept.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

const maxBuffer = 64 << 10

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h["Content-Type"] = contentTypeHeader
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // it fails if the client has gone
}

// httpDate formats the time for the header Date, once a second: that takes as long as to find
// and check all that a response depends on.
type httpDate struct{ last atomic.Pointer[dateText] }

type dateText struct {
	unix int64
	text string
}

func (d *httpDate) format(now int64) string {
	last := d.last.Load()
	if last == nil || last.unix != now {
		last = &dateText{now, time.Unix(now, 0).UTC().Format(http.TimeFormat)}
		d.last.Store(last)
	}
	return last.text
}

// appendSeconds appends n; 0 if it is negative.
func appendSeconds(b []byte, n int64) []byte { return strconv.AppendInt(b, max(n, 0), 10) }

// unescaped has the bytes that a JSON string may have as they are: printable ASCII but the quotation mark and the backslash.
var unescaped = func() (table [256]bool) {
	for c := byte(' '); c <= '~'; c++ {
		table[c] = c != '"' && c != '\\'
	}
	return table
}()

// appendString appends s as a JSON string. It is fast for strings with nothing to escape, such
// as IDs.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if !unescaped[s[i]] {
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
