package main

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// How many requests are remembered.
const (
	maxCalls  = 4096
	maxLeaked = 100
)

// service is the two fakes, and what is counted in front of them.
type service struct {
	options
	certificate []byte // of Entra, PEM
	fakes       atomic.Pointer[fakes]
	stopIMDS    func()
	stopEntra   func()

	mu     sync.Mutex // guards counts
	counts control.Counts
}

type fakes struct {
	imds  *imdstest.Server
	entra *entratest.Server
}

// newService starts to serve, with fakes that know no identity. The caller closes it.
func newService(o options) (*service, error) {
	s := &service{options: o, stopEntra: func() {}}
	s.reset()
	s.configure(control.Config{})
	ln, err := net.Listen("tcp", s.imds)
	if err != nil {
		return nil, err
	}
	s.stopIMDS = serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.fakes.Load().imds.ServeHTTP(w, r) }))
	if o.entra == "" {
		return s, nil
	}
	if ln, err = net.Listen("tcp", o.entra); err != nil {
		s.close()
		return nil, err
	}
	var certificate tls.Certificate
	if certificate, s.certificate, err = newCertificate(ln.Addr().(*net.TCPAddr).IP); err != nil { //nolint:errcheck // a TCP listener's
		s.close()
		return nil, errors.Join(err, ln.Close())
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.fakes.Load().entra.ServeHTTP(w, r) })
	s.stopEntra = serve(tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}), handler)
	return s, nil
}

// serve serves on ln until the returned function is called, which cuts connections.
func serve(ln net.Listener, handler http.Handler) (stop func()) {
	srv := &http.Server{Handler: handler, ReadHeaderTimeout: readTimeout}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(ln) // always returns a non-nil error, after Close
	}()
	return func() {
		_ = srv.Close()
		<-done
	}
}

func (s *service) close() {
	s.stopIMDS()
	s.stopEntra()
}

func (s *service) configure(cfg control.Config) {
	cfg.IMDS.OnCall = s.count
	s.fakes.Store(&fakes{imdstest.NewServer(cfg.IMDS), entratest.NewServer(cfg.Entra)})
}

func (s *service) count(c imdstest.Call) {
	call := control.Call{Time: time.Now(), Call: c}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.Requests++
	if c.Subject != "" {
		s.counts.Tokens[c.Subject]++
	}
	if len(s.counts.Calls) == maxCalls {
		s.counts.Calls = slices.Delete(s.counts.Calls, 0, maxCalls/4)
	}
	s.counts.Calls = append(s.counts.Calls, call)
	if !slices.ContainsFunc(s.pods, func(p netip.Prefix) bool { return p.Contains(c.From) }) {
		return
	}
	s.counts.Leaks++
	if len(s.counts.Leaked) < maxLeaked {
		s.counts.Leaked = append(s.counts.Leaked, call)
	}
	log.Printf("LEAK from %s: %s %s: %d, token of %q", c.From, c.Method, c.Target, c.Status, c.Subject)
}

func (s *service) reset() {
	if f := s.fakes.Load(); f != nil {
		f.imds.Reset()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts = control.Counts{Tokens: make(map[string]int)}
}

// controlHandler is the other end of control.Client.
func (s *service) controlHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /config", func(w http.ResponseWriter, r *http.Request) {
		var cfg control.Config
		if decode(w, r, &cfg) {
			s.configure(cfg)
		}
	})
	mux.HandleFunc("POST /faults", func(w http.ResponseWriter, r *http.Request) {
		var faults []imdstest.Fault
		if decode(w, r, &faults) {
			s.fakes.Load().imds.Inject(faults...)
		}
	})
	mux.HandleFunc("POST /reset", func(http.ResponseWriter, *http.Request) { s.reset() })
	mux.HandleFunc("GET /counts", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		encode(w, s.counts)
	})
	mux.HandleFunc("GET /entra", func(w http.ResponseWriter, _ *http.Request) {
		encode(w, control.Entra{Authority: "https://" + s.entraHost(), Certificate: string(s.certificate), Tokens: s.fakes.Load().entra.Tokens()})
	})
	return mux
}

// entraHost leaves the port out where it is that of https.
func (s *service) entraHost() string {
	if host, port, _ := net.SplitHostPort(s.entra); port == "443" {
		return host
	}
	return s.entra
}

func decode(w http.ResponseWriter, r *http.Request, into any) bool {
	err := json.NewDecoder(r.Body).Decode(into)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
	return err == nil
}

func encode(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) } // fails when the test has gone
