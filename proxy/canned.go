package proxy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
)

// http.Server answers what it cannot parse itself, in plain text, and no handler is
// asked. SDKs expect JSON of every answer of the metadata service, whatever it says, so
// that what it writes to a connection whose request no handler has is replaced here.

// connKey finds the *conn of a request in its context.
type connKey struct{}

func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// handling notes that from here on what is written to the connection is an answer of
// ours. It ends when the connection becomes idle, see changed: http.Server says so after
// it has flushed an answer, and before it reads the next request.
func handling(r *http.Request) {
	if one, ok := r.Context().Value(connKey{}).(*conn); ok {
		one.handled.Store(true)
	}
}

// Write implements net.Conn.
func (one *conn) Write(p []byte) (int, error) {
	switch {
	case one.handled.Load():
		return one.Conn.Write(p)
	case !one.refused: // only the connection's own goroutine comes here
		one.refused = true
		if _, err := one.Conn.Write(cannedAnswer(p)); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// cannedAnswer is one of IMDS's shape that has the status of an answer of http.Server.
// All of those end the connection.
func cannedAnswer(written []byte) []byte {
	const statusAt = len("HTTP/1.1 ")
	status := http.StatusBadRequest
	if len(written) >= statusAt+3 {
		if n, err := strconv.Atoi(string(written[statusAt : statusAt+3])); err == nil && n >= 400 && n <= 599 {
			status = n
		}
	}
	description := "The request cannot be parsed"
	if status != http.StatusBadRequest {
		description = http.StatusText(status)
	}
	body := fmt.Sprintf(`{"error":"invalid_request","error_description":"%s"}`, description)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		status, http.StatusText(status), contentType, len(body), body)
}
