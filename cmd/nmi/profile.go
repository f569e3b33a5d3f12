package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"
)

// profileAddress is the old NMI's. No pod reaches loopback, unless it is on the host network.
const profileAddress = "127.0.0.1:6060"

// newProfilePage returns the page of --enableProfile: net/http/pprof, and nothing else. No other
// listener has it.
func newProfilePage(address string, log *slog.Logger) *page {
	p := newPage(flagEnableProfile, log, func(ctx context.Context) (pageListener, error) {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp4", address)
		if err != nil {
			return nil, fmt.Errorf("another program, or another agent, may have the port: %w", err)
		}
		return ln.(*net.TCPListener), nil //nolint:errcheck // it is one, of this network
	})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("POST /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	p.handler, p.nodeOnly = mux, true
	return p
}

// serveNodeOnly is http.Server's Serve until ctx ends. A profile may take minutes.
func serveNodeOnly(ctx context.Context, ln net.Listener, handler http.Handler, log *slog.Logger) error {
	server := http.Server{
		Handler: handler, ReadHeaderTimeout: pageHeadTimeout, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError),
	}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.Serve(ln); ctx.Err() == nil {
		return err
	}
	return nil
}
