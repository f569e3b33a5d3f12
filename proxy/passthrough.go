package proxy

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	"github.com/podidentity/nmi/proxy/listener"
)

// maxBody bounds the body of a request that is passed through. The largest that IMDS needs is
// an approval of scheduled events: an ID of 36 bytes for each.
const maxBody = 64 << 10

// passThroughTimeout bounds the time that a client takes to read a response of IMDS's.
const passThroughTimeout = 3 * time.Minute

// maxPassThrough is how many requests of one caller are passed through at once, each until its
// response has been read: a slow reader delays only itself.
const maxPassThrough = 8

// passThrough sends a request to IMDS as it is. It is the one way there for requests of pods,
// and has their bounds. why is for the log: the path or the pod, as keys and values.
func (s *Server) passThrough(w http.ResponseWriter, r *http.Request, why ...any) error {
	s.log.DebugContext(r.Context(), "passed through", append(why, "from", peerOf(r), "method", r.Method)...)
	if r.ContentLength > maxBody { // not even its beginning
		return &http.MaxBytesError{Limit: maxBody}
	}
	conn := listener.FromContext(r.Context())
	if !conn.Acquire(maxPassThrough) {
		return errTooMany
	}
	defer conn.Release()
	conn.WantBody()
	r.Body = clientBody{http.MaxBytesReader(nil, r.Body, maxBody)} // the connection of a request with a body ends anyway
	s.reverseProxy.ServeHTTP(w, r)
	return nil
}

// clientBody marks errors of reading the request's body, to tell them from errors of IMDS.
type clientBody struct{ io.ReadCloser }

func (b clientBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	var tooLong *http.MaxBytesError
	if err != nil && !errors.Is(err, io.EOF) && !errors.As(err, &tooLong) {
		err = fmt.Errorf("%w: %w", errBody, err)
	}
	return n, err
}

// dropOddHeaders removes headers whose names a server could take for another's, such as
// Transfer_Encoding. Those that the public paths need have letters, digits and dashes.
func dropOddHeaders(h http.Header) {
	for name := range h {
		if strings.ContainsFunc(name, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-'
		}) {
			delete(h, name)
		}
	}
}

// copyBuffers are for ReverseProxy, whose own have 32 KiB.
type copyBuffers struct{ sync.Pool }

func newCopyBuffers() *copyBuffers {
	return &copyBuffers{sync.Pool{New: func() any { return new([4 << 10]byte) }}}
}

// Get implements httputil.BufferPool.
func (b *copyBuffers) Get() []byte { return b.Pool.Get().(*[4 << 10]byte)[:] } //nolint:errcheck // nothing else is in it

// Put implements httputil.BufferPool.
func (b *copyBuffers) Put(p []byte) { b.Pool.Put((*[4 << 10]byte)(p)) }

// newReverseProxy returns the proxy for requests that are passed through. Its transport returns
// whole responses.
func (s *Server) newReverseProxy() *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Transport: s.cfg.Upstream,
		Rewrite: func(p *httputil.ProxyRequest) {
			// ReverseProxy needs a host; the upstream sets the real one.
			p.Out.URL.Scheme, p.Out.URL.Host = "http", "imds"
			// Nothing follows a body on its connection to IMDS, whatever IMDS takes for its
			// end.
			p.Out.Close = p.In.ContentLength != 0
			// ReverseProxy drops parameters that it cannot parse, and the headers below.
			// IMDS refuses requests with X-Forwarded-For: without it, the pod would lose
			// that protection.
			p.Out.URL.RawQuery = p.In.URL.RawQuery
			for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v, ok := p.In.Header[name]; ok {
					p.Out.Header[name] = v
				}
			}
			p.In.Header = nil // Out has a copy
		},
		ModifyResponse: func(r *http.Response) error {
			if r.Request != nil { // as http.Transport's responses have it
				listener.FromContext(r.Request.Context()).SetResponseDeadline(time.Now().Add(passThroughTimeout))
			}
			return nil
		},
		BufferPool: newCopyBuffers(),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			s.refuse(w, r, fmt.Errorf("passing the request through: %w", err))
		},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}
