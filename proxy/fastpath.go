package proxy

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// The fast path answers requests whose head is known and whose token is in memory, without
// http.Server. It is the way of nearly all requests. A connection begins there, and goes to
// http.Server with the first request that needs more; http.Server gives it back with the first
// request whose head is known.

// now is a context that has ended: whoever gets it does not wait.
var now = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// fastPath serves a connection until it ends, or returns true when http.Server has to serve it.
// timeout is for its next request.
func (s *Server) fastPath(c *listener.Conn, timeout time.Duration) (handOver bool) {
	if s.heads == nil || c.Loopback() {
		return true
	}
	var head *knownHead
	for ; ; timeout = idleTimeout {
		request, err := c.Next(timeout)
		if err != nil {
			_ = c.Close()
			return false
		}
		if head == nil || !head.matches(request) {
			if head = s.heads.find(c.Caller(), request); head == nil {
				return true
			}
		}
		if s.draining.Load() {
			return true
		}
		arrived := c.AwaitTurn()
		a, ok := s.tokenInMemory(c, head.req)
		if !ok {
			return true
		}
		last := head.last || s.draining.Load() // which may have begun while the request was held back
		err = s.respond(c, a.token, last, a.at)
		s.requests.recordHit(a.source, time.Since(arrived))
		if err != nil || last {
			_ = c.Close()
			return false
		}
	}
}

// tokenInMemory is tokens for a request with a known head. It reports false for what token would
// have to wait for, refuse, or pass through.
func (s *Server) tokenInMemory(c *listener.Conn, req tokenRequest) (a answer, ok bool) {
	pod, err := s.resolveNow(c)
	if err != nil || pod.Exception() != "" {
		return a, false
	}
	a, err = s.tokens(now, pod, c.Caller(), req)
	return a, err == nil && len(a.auxiliary) == 0
}

// respond writes the response with a token that http.Server would write, byte for byte.
func (s *Server) respond(c *listener.Conn, token *tokencache.Token, last bool, at int64) error {
	buffer := buffers.Get().(*[]byte) //nolint:errcheck // nothing else is put there
	defer putBuffer(buffer)
	const maxHeader = 256
	b := appendToken((*buffer)[:maxHeader], token, at)
	*buffer = b

	var header [maxHeader]byte
	h := append(header[:0], "HTTP/1.1 200 OK\r\nContent-Length: "...)
	h = strconv.AppendInt(h, int64(len(b)-maxHeader), 10)
	h = append(h, "\r\nContent-Type: "+contentType+"\r\nDate: "...)
	h = append(h, s.date.format(at)...)
	if last {
		h = append(h, "\r\nConnection: close"...)
	}
	h = append(h, "\r\n\r\n"...)
	response := b[maxHeader-len(h):]
	copy(response, h)
	return c.Respond(response)
}

// takeBack answers a request whose head is known, and moves its connection from
// http.Server to the fast path. It returns false, and has written nothing, if it cannot do so.
func (s *Server) takeBack(w *response, c *listener.Conn, token *tokencache.Token) bool {
	if s.draining.Load() {
		return false
	}
	_, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return false
	}
	w.status = http.StatusOK
	unread, _ := buffered.Peek(buffered.Reader.Buffered())
	mine := c.TakeBack(unread)
	serve := func() {
		last := s.draining.Load()
		switch {
		case s.respond(c, token, last, time.Now().Unix()) != nil || last:
			_ = c.Close()
		case mine:
			s.front.serve(c, idleTimeout)
		default:
			s.front.handOver(c)
		}
	}
	if !s.front.goServe(serve) { // draining has begun meanwhile
		serve()
	}
	return true
}
