package proxy

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// maxBody bounds the body of a request that is passed on. The largest that IMDS has a
// use for is an approval of scheduled events: one ID of 36 bytes for each.
const maxBody = 64 << 10

// maxPassingEach is how many requests of one address are passed on at once, until their
// answers have been taken: a pod that reads slowly holds up itself.
const maxPassingEach = 8

// forwards sends a request to IMDS, within the bounds that hold for what is passed on.
func (s *Server) forwards(w http.ResponseWriter, r *http.Request) error {
	if r.ContentLength > maxBody { // not even its beginning
		return &http.MaxBytesError{Limit: maxBody}
	}
	from := callerOf(r) // the zero one counts too
	if !s.passing.enter(from) {
		return errPassing
	}
	defer s.passing.leave(from)
	wantBody(r)
	r.Body = clientBody{http.MaxBytesReader(nil, r.Body, maxBody)} // the connection of a request with a body ends anyway
	s.forward.ServeHTTP(w, r)
	return nil
}

// clientBody tells what is wrong with a request's body from what is wrong with IMDS.
type clientBody struct{ io.ReadCloser }

func (b clientBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	var long *http.MaxBytesError
	if err != nil && !errors.Is(err, io.EOF) && !errors.As(err, &long) {
		err = fmt.Errorf("%w: %w", errBody, err)
	}
	return n, err
}

// dropOddHeaders removes headers whose names a server might read as another's, such as
// Transfer_Encoding: what the open paths need has letters, digits and dashes.
func dropOddHeaders(h http.Header) {
	for name := range h {
		if strings.ContainsFunc(name, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-'
		}) {
			delete(h, name)
		}
	}
}

// passing counts the requests of each address that are being passed on.
type passing struct {
	mu     sync.Mutex // guards byAddr
	byAddr map[netip.Addr]int
}

func (p *passing) enter(from netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byAddr[from] >= maxPassingEach {
		return false
	}
	if p.byAddr == nil {
		p.byAddr = make(map[netip.Addr]int)
	}
	p.byAddr[from]++
	return true
}

func (p *passing) leave(from netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byAddr[from]--; p.byAddr[from] == 0 {
		delete(p.byAddr, from)
	}
}

// copyBuffers are ReverseProxy's, whose own are of 32 KiB.
type copyBuffers struct{ sync.Pool }

func newCopyBuffers() *copyBuffers {
	return &copyBuffers{sync.Pool{New: func() any { return new([4 << 10]byte) }}}
}

// Get implements httputil.BufferPool.
func (b *copyBuffers) Get() []byte { return b.Pool.Get().(*[4 << 10]byte)[:] } //nolint:errcheck // nothing else is in it

// Put implements httputil.BufferPool.
func (b *copyBuffers) Put(p []byte) { b.Pool.Put((*[4 << 10]byte)(p)) }

// newForward returns the proxy for what IMDS answers itself: the open paths, and
// everything that excepted pods send. Its transport returns whole answers.
func (s *Server) newForward() *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Transport: s.cfg.Upstream,
		Rewrite: func(p *httputil.ProxyRequest) {
			// The upstream sets the real one; the proxy wants some host there.
			p.Out.URL.Scheme, p.Out.URL.Host = "http", "imds"
			// What follows a body must not be read as its end or its beginning, whatever
			// IMDS thinks of where bodies end: nothing follows it on its connection.
			p.Out.Close = p.In.ContentLength != 0
			// ReverseProxy drops what it cannot parse, and the headers below. IMDS
			// refuses requests that carry X-Forwarded-For, and must go on doing
			// so: dropping it would take that protection from the pod.
			p.Out.URL.RawQuery = p.In.URL.RawQuery
			for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v, ok := p.In.Header[name]; ok {
					p.Out.Header[name] = v
				}
			}
			p.In.Header = nil // Out has a copy
		},
		ModifyResponse: func(r *http.Response) error {
			if c := connOf(r.Request); c != nil {
				c.answerBy = time.Now().Add(passedTimeout)
			}
			return nil
		},
		BufferPool: newCopyBuffers(),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			s.refuse(w, r, fmt.Errorf("passing a request on: %w", err))
		},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}
