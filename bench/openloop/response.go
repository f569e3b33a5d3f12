package openloop

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

var (
	statusOK      = []byte("HTTP/1.1 200 ")
	headEnd       = []byte("\r\n\r\n")
	contentLength = []byte("\r\nContent-Length: ")
)

// responseLength is the length of the response that b begins with, 0 if its head is not
// complete. It reads no more of HTTP than the servers that are compared write: a 200
// with a Content-Length, spelled like that.
func responseLength(b []byte) (int, error) {
	end := bytes.Index(b, headEnd)
	if end < 0 {
		return 0, nil
	}
	head := b[:end+2]
	if !bytes.HasPrefix(head, statusOK) {
		return 0, fmt.Errorf("response is not 200: %q", b)
	}
	_, rest, found := bytes.Cut(head, contentLength)
	if !found {
		return 0, errors.New("response without Content-Length")
	}
	digits, _, _ := bytes.Cut(rest, headEnd[:2])
	n, err := strconv.ParseUint(string(digits), 10, 31)
	if err != nil {
		return 0, fmt.Errorf("malformed Content-Length: %w", err)
	}
	return end + len(headEnd) + int(n), nil
}
