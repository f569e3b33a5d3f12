package proxy

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
)

// maxBody bounds the body of a request that is passed on. The largest that IMDS has a
// use for is an approval of scheduled events: one ID of 36 bytes for each.
const maxBody = 64 << 10

// newForward returns the proxy for what IMDS answers itself: the open paths, and
// everything that excepted pods send.
func (s *Server) newForward() *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Transport: s.cfg.Upstream,
		Rewrite: func(p *httputil.ProxyRequest) {
			// The upstream sets the real one; the proxy wants some host there.
			p.Out.URL.Scheme, p.Out.URL.Host = "http", "imds"
			// ReverseProxy drops what it cannot parse, and the headers below. IMDS
			// refuses requests that carry X-Forwarded-For, and must go on doing
			// so: dropping it would take that protection from the pod.
			p.Out.URL.RawQuery = p.In.URL.RawQuery
			for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v, ok := p.In.Header[name]; ok {
					p.Out.Header[name] = v
				}
			}
		},
		ModifyResponse: func(r *http.Response) error { s.finish(r.Header); return nil },
		FlushInterval:  -1, // stream as it comes
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			s.refuse(w, r, fmt.Errorf("passing a request on: %w", err))
		},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}
