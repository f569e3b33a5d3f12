package proxy

import (
	"fmt"
	"net/http"
	"strconv"
)

// http.Server answers what it cannot parse itself, in plain text, and no handler is
// asked. SDKs expect JSON of every answer of the metadata service, whatever it says, so
// that what it writes to a connection whose request no handler has is replaced here.

// cannedAnswer is one of IMDS's shape that has the status of an answer of http.Server, or
// 431 if that could not read a head of too many lines. All of those end the connection.
func cannedAnswer(written []byte, manyLines bool) []byte {
	const statusAt = len("HTTP/1.1 ")
	status := http.StatusBadRequest
	if manyLines {
		status = http.StatusRequestHeaderFieldsTooLarge
	} else if len(written) >= statusAt+3 {
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
