package proxy

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

// What no handler is asked about; TestOddRequestLines and its neighbours have the rest.
func TestWhatCannotBeParsedIsAnsweredInJSON(t *testing.T) {
	w := newWorld(t, nil)
	for raw, want := range map[string]struct {
		status int
		body   string
	}{
		"GET / HTTP/1.1\r\n\r\n":                                       {400, `{"error":"invalid_request","error_description":"The request cannot be parsed"}`},
		"nonsense\r\n\r\n":                                             {400, `{"error":"invalid_request","error_description":"The request cannot be parsed"}`},
		"GET / HTTP/1.1\r\nHost: h\r\nExpect: more\r\n\r\n":            {417, `{"error":"invalid_request","error_description":"Expectation Failed"}`},
		strings.Repeat("x", 16384):                                     {431, `{"error":"invalid_request","error_description":"Request Header Fields Too Large"}`},
		"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n": {501, `{"error":"invalid_request","error_description":"Not Implemented"}`},
		"GET / HTTP/2.0\r\nHost: h\r\n\r\n":                            {505, `{"error":"invalid_request","error_description":"HTTP Version Not Supported"}`},
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n":               {400, `{"error":"invalid_request","error_description":"The request cannot be parsed"}`},
	} {
		resp, body := w.send(bound, raw)
		assert.Equal(t, want.status, resp.StatusCode, "%.40q", raw)
		assert.Equal(t, want.body, body)
		assert.True(t, json.Valid([]byte(body)))
		assert.Equal(t, contentType, resp.Header.Get("Content-Type"))
		assert.Equal(t, int64(len(body)), resp.ContentLength)
		assert.True(t, resp.Close)
	}
}

func TestACannedAnswerAfterOurOwn(t *testing.T) {
	w := newWorld(t, nil)
	assert.Equal(t, []string{"200", "404", "400"}, w.answers(t, bound, get(versions)+get(nowhere)+"nonsense\r\n\r\n", "closed"))
}
