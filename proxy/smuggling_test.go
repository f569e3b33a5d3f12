package proxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// odd is a request, or what looks like one, and what comes of it.
type odd struct {
	raw      string
	bound    told // the zero value is refused
	excepted told // the zero value is as bound
}

// told is what a pod is told, and what IMDS is asked for it.
type told struct {
	// The statuses, and the connection's end: "closed", or "open" for one more request,
	// or "cut" if the pod has to finish sending to learn that nothing follows.
	answers string
	// What it is asked, with commas; after "perhaps" when it may have seen the head of a
	// request whose body then proved to be none, and may have answered that before.
	imds string
}

var refused = told{answers: "400 closed"}

const (
	versions = "/metadata/versions"
	last     = "/metadata/identity"   // 404 to everybody, like
	nowhere  = "/metadata/identity/x" // this
	info     = "/metadata/identity/info?api-version=2018-02-01"
	// hidden is a request that a bound pod may not make: IMDS would name the node's
	// tenant. Where it shows up as a request of its own it is decided as one.
	hidden = "GET " + info + " HTTP/1.1\r\nHost: h\r\nMetadata: true\r\n\r\n"
)

// get is a request that may stay on its connection, up to the end of its header.
func get(target string, headers ...string) string {
	return "GET " + target + " HTTP/1.1\r\nHost: h\r\nMetadata: true\r\n" + strings.Join(append(headers, "\r\n"), "\r\n")
}

// Where a request ends (RFC 9112, 6.3 and 11.2).
func TestRequestSmuggling(t *testing.T) {
	const chunked, length = "Transfer-Encoding: chunked", "Content-Length: "
	hiddenLength := length + strconv.Itoa(len(hidden))
	twice := told{"200 404 open", "GET " + versions}
	both := told{"200 200 open", "GET " + versions + ", GET " + info}
	passed := told{"200 closed", "GET " + versions}
	broken := told{"400 closed", "perhaps GET " + versions}
	tryAll(t, map[string]odd{
		"CL.TE":                          {get(versions, length+"6", chunked) + "0\r\n\r\n" + hidden, refused, passed},
		"CL.TE on the token path":        {get(tokenURL, length+"6", chunked) + "0\r\n\r\n" + hidden, told{answers: "200 closed"}, told{"200 closed", "GET " + tokenURL}},
		"TE.CL":                          {get(versions, chunked, length+"4") + strconv.FormatInt(int64(len(hidden)), 16) + "\r\n" + hidden + "\r\n0\r\n\r\n", refused, passed},
		"TE.CL, no end":                  {get(versions, chunked, length+"4") + "0\r\n" + hidden, refused, broken},
		"CL.0":                           {get(versions, hiddenLength) + hidden, refused, passed},
		"CL.0 on a path of nobody's":     {get(nowhere, hiddenLength) + hidden, told{answers: "404 closed"}, told{"404 closed", "GET " + nowhere}},
		"0.CL":                           {get(versions, length+"0") + hidden, twice, both},
		"TE with a space before colon":   {raw: get(versions, "Transfer-Encoding : chunked") + "0\r\n\r\n" + hidden},
		"TE with a tab before colon":     {raw: get(versions, "Transfer-Encoding\t: chunked") + "0\r\n\r\n" + hidden},
		"TE xchunked":                    {get(versions, "Transfer-Encoding: xchunked") + "0\r\n\r\n" + hidden, told{answers: "501 closed"}, told{}},
		"TE after a tab":                 {get(versions, "Transfer-Encoding:\tchunked") + "0\r\n\r\n" + hidden, refused, passed},
		"TE after a vertical tab":        {get(versions, "Transfer-Encoding: \vchunked") + "0\r\n\r\n" + hidden, told{}, told{}},
		"TE twice":                       {get(versions, chunked, chunked) + "0\r\n\r\n" + hidden, told{answers: "501 closed"}, told{}},
		"TE and another":                 {get(versions, chunked, "Transfer-Encoding: identity") + "0\r\n\r\n" + hidden, told{answers: "501 closed"}, told{}},
		"TE chunked, identity":           {get(versions, "Transfer-Encoding: chunked, identity") + "0\r\n\r\n" + hidden, told{answers: "501 closed"}, told{}},
		"TE identity":                    {get(versions, "Transfer-Encoding: identity") + hidden, told{answers: "501 closed"}, told{}},
		"TE empty":                       {get(versions, "Transfer-Encoding:") + hidden, told{answers: "501 closed"}, told{}},
		"TE in quotes":                   {get(versions, `Transfer-Encoding: "chunked"`) + "0\r\n\r\n" + hidden, told{answers: "501 closed"}, told{}},
		"TE in capitals":                 {get(versions, "TRANSFER-ENCODING: CHUNKED") + "0\r\n\r\n" + hidden, refused, passed},
		"TE with an underscore":          {get(versions, "Transfer_Encoding: chunked") + hidden, twice, both},
		"TE on a folded line":            {get(versions, "Transfer-Encoding:\r\n chunked") + "0\r\n\r\n" + hidden, refused, passed},
		"TE folded into another":         {get(versions, "X: y\r\n Transfer-Encoding: chunked") + hidden, twice, both},
		"TE of HTTP/1.0 kept alive":      {"GET " + versions + " HTTP/1.0\r\nMetadata: true\r\nConnection: keep-alive\r\n" + chunked + "\r\n\r\n" + hidden, passed, passed},
		"CL twice, the same":             {get(versions, length+"5", length+"5") + "hello" + hidden, refused, passed},
		"CL twice, another":              {raw: get(versions, length+"5", length+"0") + "hello" + hidden},
		"CL as a list":                   {raw: get(versions, length+"5, 5") + "hello" + hidden},
		"CL with a sign":                 {raw: get(versions, length+"+5") + "hello" + hidden},
		"CL in hex":                      {raw: get(versions, length+"0x5") + "hello" + hidden},
		"CL negative":                    {raw: get(versions, length+"-1") + hidden},
		"CL with an underscore in it":    {raw: get(versions, length+"1_0") + hidden},
		"CL empty":                       {raw: get(versions, length) + hidden},
		"CL beyond all":                  {raw: get(versions, length+"99999999999999999999") + hidden},
		"CL with a space before colon":   {raw: get(versions, "Content-Length : 5") + "hello" + hidden},
		"chunk extension":                {get(versions, chunked) + "5;a=b\r\nhello\r\n0\r\n\r\n" + hidden, refused, passed},
		"chunk extension with a bare LF": {get(versions, chunked) + "5;a\nhello\r\n0\r\n\r\n" + hidden, refused, broken},
		"chunk size that is no number":   {get(versions, chunked) + "0x5\r\nhello\r\n0\r\n\r\n" + hidden, refused, broken},
		"chunk size beyond all":          {get(versions, chunked) + "fffffffffffffffff\r\nhello\r\n0\r\n\r\n" + hidden, refused, broken},
		"chunk longer than its size":     {get(versions, chunked) + "1\r\nhello\r\n0\r\n\r\n" + hidden, refused, broken},
		"trailers":                       {get(versions, chunked, "Trailer: X-Forwarded-For") + "0\r\nX-Forwarded-For: 1.2.3.4\r\nMetadata: false\r\n\r\n" + hidden, refused, passed},
		"trailers, a length among them":  {get(versions, chunked, "Trailer: Content-Length") + "0\r\nContent-Length: 5\r\n\r\n" + hidden, refused, refused},
		"two in one segment":             {get(versions) + hidden, twice, both},
		"three, the first refused":       {get(nowhere) + hidden + get(versions), told{"404 404 200 open", "GET " + versions}, told{"404 200 200 open", "GET " + nowhere + ", GET " + info + ", GET " + versions}},
		"two, the first the last":        {get(versions, "Connection: close") + hidden, passed, passed},
		"two, HTTP/1.0":                  {"GET " + versions + " HTTP/1.0\r\nMetadata: true\r\n\r\n" + hidden, passed, passed},
		"HEAD with a body":               {strings.Replace(get(versions, hiddenLength), "GET", "HEAD", 1) + hidden, told{answers: "405 closed"}, told{"200 closed", "HEAD " + versions}},
		"POST with a body":               {strings.Replace(get(tokenURL, hiddenLength), "GET", "POST", 1) + hidden, told{answers: "405 closed"}, told{"405 closed", "POST " + tokenURL}},
		"100-continue without a body":    {get(versions, "Expect: 100-continue") + hidden, twice, both},
		"100-continue with a body":       {get(versions, "Expect: 100-continue", hiddenLength) + hidden, refused, told{"100 200 closed", "GET " + versions}},
		"100-continue on the token path": {get(tokenURL, "Expect: 100-continue", hiddenLength) + hidden, told{answers: "200 closed"}, told{"100 200 closed", "GET " + tokenURL}},
		"another expectation":            {get(versions, "Expect: the worst") + hidden, told{answers: "417 closed"}, told{}},
	})
}

// tryAll sends each from a bound pod, whose token is in memory, and from an excepted one,
// each time in a world that knows of no other.
func tryAll(t *testing.T, all map[string]odd) {
	t.Helper()
	for name, tc := range all {
		if tc.bound == (told{}) {
			tc.bound = refused
		}
		if tc.excepted == (told{}) {
			tc.excepted = tc.bound
		}
		for from, want := range map[string]told{bound: tc.bound, excepted: tc.excepted} {
			t.Run(name+" from "+from, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, nil)
				resp, _ := w.get(bound, tokenURL)
				require.Equal(t, 200, resp.StatusCode)
				w.imds.Reset()
				end := want.answers[strings.LastIndex(want.answers, " ")+1:]
				got := told{answers: strings.Join(append(w.answers(t, from, tc.raw, end), end), " ")}
				for _, call := range w.imds.Calls() {
					if call.Path != last {
						got.imds += ", " + call.Method + " " + call.Target
					}
				}
				got.imds = strings.TrimPrefix(got.imds, ", ")
				switch perhaps, ok := strings.CutPrefix(want.imds, "perhaps "); {
				case ok && got.imds == perhaps && got.answers == "200 "+end: // it was faster than what follows the head
					got = want
				case ok && (got.imds == "" || got.imds == perhaps):
					got.imds = want.imds
				}
				assert.Equal(t, want, got)
			})
		}
	}
}

// ofNetHTTP reports whether a response is net/http's own, to what it cannot parse or does not
// support. Nothing that reaches a handler is answered so.
func ofNetHTTP(resp *http.Response, body []byte) bool {
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusRequestHeaderFieldsTooLarge, http.StatusHTTPVersionNotSupported:
		return resp.Header.Get("Content-Type") == "text/plain; charset=utf-8" && bytes.HasPrefix(body, []byte(strconv.Itoa(resp.StatusCode)))
	case http.StatusNotImplemented:
		return string(body) == "Unsupported transfer encoding"
	default:
		return resp.StatusCode == http.StatusExpectationFailed && len(body) == 0
	}
}

// answers sends raw from a pod's address, and checks that each answer is JSON, save net/http's own, and
// that the connection then is at the end that was promised; see told.
func (w *world) answers(t *testing.T, from, raw, end string) (statuses []string) {
	t.Helper()
	conn := w.connect(from)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	if end == "open" {
		raw += get(last, "Connection: close")
	}
	_, err := io.WriteString(conn, raw)
	require.NoError(t, err)
	if end == "cut" {
		require.NoError(t, conn.Conn.(*net.TCPConn).CloseWrite())
	}
	for {
		if _, err := conn.r.Peek(1); err != nil {
			require.NotErrorIs(t, err, os.ErrDeadlineExceeded, "open, after %q", statuses)
			break
		}
		method, _, _ := strings.Cut(raw, " ")
		resp, err := http.ReadResponse(conn.r, &http.Request{Method: method})
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		if !errors.Is(err, syscall.ECONNRESET) || !ofNetHTTP(resp, body) { // it leaves unread what it does not understand
			require.NoError(t, err)
		}
		imds := from == excepted && len(body) == 0 // which says nothing to "OPTIONS *"
		switch {
		case ofNetHTTP(resp, body):
			assert.True(t, resp.Close)
		case resp.StatusCode >= 200 && method != http.MethodHead && !imds:
			assert.True(t, json.Valid(body), "%q", body)
			assert.Equal(t, contentType, resp.Header.Get("Content-Type"))
			assert.NotContains(t, string(body), "unreachable")
		}
		statuses = append(statuses, strconv.Itoa(resp.StatusCode))
	}
	if end == "open" {
		require.NotEmpty(t, statuses)
		assert.Equal(t, "404", statuses[len(statuses)-1], "the one more")
		statuses = statuses[:len(statuses)-1]
	}
	return statuses
}
