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
		c.AwaitTurn()
		token, at := s.tokenInMemory(c, head.req)
		if token == nil {
			return true
		}
		s.fastPathRequests.Add(1)
		last := head.last || s.draining.Load() // which may have begun while the request was held back
		if s.respond(c, token, last, at) != nil || last {
			_ = c.Close()
			return false
		}
	}
}

// tokenInMemory is token for a request with a known head, and also returns when it looked. It
// returns nil for what token would have to wait, and for what it would refuse or pass through.
func (s *Server) tokenInMemory(c *listener.Conn, req tokenRequest) (token *tokencache.Token, at time.Time) {
	pod, err := s.resolve(now, c.Caller(), c)
	if err != nil || pod.Exception() != "" {
		return nil, at
	}
	token, auxiliary, at, err := s.tokens(now, pod, c.Caller(), req)
	if err != nil || len(auxiliary) > 0 {
		return nil, at
	}
	return token, at
}

// respond writes the response with a token that http.Server would write, byte for byte.
func (s *Server) respond(c *listener.Conn, token *tokencache.Token, last bool, at time.Time) error {
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
func (s *Server) takeBack(w http.ResponseWriter, c *listener.Conn, token *tokencache.Token) bool {
	if s.draining.Load() {
		return false
	}
	_, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return false
	}
	unread, _ := buffered.Peek(buffered.Reader.Buffered())
	mine := c.TakeBack(unread)
	serve := func() {
		last := s.draining.Load()
		switch {
		case s.respond(c, token, last, time.Now()) != nil || last:
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
