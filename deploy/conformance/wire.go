package conformance

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	// patience is how long a case waits for an answer: the agent itself may wait
	// 10 s for an identity, and then for its upstream.
	patience = 30 * time.Second
	// probePatience is that of azidentity and @azure/identity when they look
	// whether there is a metadata service at all.
	probePatience = time.Second
	// maxAnswer bounds what is read of one answer.
	maxAnswer = 1 << 20
)

// request is what goes over the wire.
type request struct {
	method  string // "" is GET
	target  string // as it is written, spaces and odd bytes included
	headers []string
	body    string
	host    string // "" is the Target's
	label   string // how reports quote it; "" is method and target
}

const (
	tokenPath = "/metadata/identity/oauth2/token"
	metadata  = "Metadata: true"
)

func get(target string, headers ...string) request {
	return request{target: target, headers: headers}
}

// String is the request as reports quote it.
func (r request) String() string {
	if r.label != "" {
		return r.label
	}
	method := r.method
	if method == "" {
		method = http.MethodGet
	}
	return fmt.Sprintf("%s %s", method, strings.Trim(fmt.Sprintf("%+q", r.target), `"`))
}

// answer is what came back.
type answer struct {
	to      request
	status  int // 0 when nothing came that can be read
	header  http.Header
	body    []byte // as it came: chunked if it was chunked
	took    time.Duration
	problem string // why there is no status
}

// send opens a connection, writes the request and reads until the service closes:
// bytes after the end of the body would be seen.
func (c *conversation) send(from Caller, r request) (a answer) {
	a.to = r
	method, host := r.method, r.host
	if method == "" {
		method = http.MethodGet
	}
	if host == "" {
		host = c.Host
	}
	text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n", method, r.target, host)
	for _, header := range r.headers {
		text += header + "\r\n"
	}
	if r.body != "" || method != http.MethodGet {
		text += fmt.Sprintf("Content-Length: %d\r\n", len(r.body))
	}
	text += "\r\n" + r.body

	begin := time.Now()
	defer func() { a.took = time.Since(begin) }()
	conn, err := from.Dial(c.ctx)
	if err != nil {
		a.problem = "no connection: " + err.Error()
		return a
	}
	defer conn.Close()
	_ = conn.SetDeadline(begin.Add(patience)) // an error would show in what follows
	if _, err := io.WriteString(conn, text); err != nil {
		a.problem = "the connection ended while the request was sent"
		return a
	}
	raw, err := io.ReadAll(io.LimitReader(conn, maxAnswer))
	if err != nil && len(raw) == 0 {
		a.problem = "no answer"
		return a
	}
	_, body, ok := bytes.Cut(raw, []byte("\r\n\r\n"))
	if !ok {
		a.problem = "not an HTTP answer"
		return a
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(raw)), nil)
	if err != nil {
		a.problem = "not an HTTP answer"
		return a
	}
	_ = resp.Body.Close() // the body is read already
	a.status, a.header, a.body = resp.StatusCode, resp.Header, body
	return a
}

// ask is send, and remembers errors for the cases that are about all of them.
func (c *conversation) ask(r request) answer { return c.askFrom(c.Caller, r) }

func (c *conversation) askFrom(from Caller, r request) answer {
	a := c.send(from, r)
	if a.status >= http.StatusBadRequest {
		c.errors = append(c.errors, a)
	}
	return a
}

// malformed is send for what no HTTP client would: what a server says to that is
// its own affair, as long as it is no token.
func (c *conversation) malformed(from Caller, r request) answer { return c.send(from, r) }
