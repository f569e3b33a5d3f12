package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/podidentity/nmi/cmd/nmi/status"
	"github.com/podidentity/nmi/cmd/nmi/telemetry"
)

// page is a listener with pages on it: the metrics port, the probe port, the probe
// socket. No token depends on it, so that a failure to listen (the port is taken, the
// address is not on this node) ends nothing: it is a warning and a note in /readyz, and
// is tried again until it succeeds.
type page struct {
	flag    string // that chooses the port or socket
	listen  func(context.Context) (pageListener, error)
	handler http.Handler // set before run
	// nodeOnly says that no pod reaches it: it has none of the limits of page_server.go.
	nodeOnly bool
	log      *slog.Logger
	retry    chan struct{} // holds a value when it is worth trying again at once

	mu  sync.Mutex // guards what follows
	ln  pageListener
	err error // why nothing is served; nil while pages are
}

// pageListener is a TCP or Unix listener.
type pageListener interface {
	net.Listener
	syscall.Conn
	File() (*os.File, error)
}

// The pause before the next attempt to listen; it doubles.
const (
	firstRetry = time.Second
	maxRetry   = time.Minute
)

func newPage(flag string, log *slog.Logger, listen func(context.Context) (pageListener, error)) *page {
	return &page{flag: flag, listen: listen, log: log, retry: make(chan struct{}, 1)}
}

func newPortPage(at endpoint, log *slog.Logger) *page {
	return newPage(at.flag, log, func(ctx context.Context) (pageListener, error) { return listen(ctx, at) })
}

// buildPages makes the agent's pages: on two ports of the node, and on a socket of its
// own pod.
func (a *agent) buildPages() {
	a.probes, a.metrics = newPortPage(a.cfg.probes, a.log), newPortPage(a.cfg.metrics, a.log)
	a.probeSocket = newPage(flagProbeSocket, a.log, func(ctx context.Context) (pageListener, error) {
		return listenUnix(ctx, a.cfg.probeSocket)
	})
	parts := status.Parts{
		Version: version, Node: a.cfg.resolver.Node, Mode: a.cfg.resolver.Mode, Started: time.Now(), Ready: a.health.err, Notes: a.health.notes,
		Rules: a.rules.Status, Pods: a.resolver, Confirm: expectSource(a.links), Upstream: a.upstream, Tokens: a.tokens, Server: a.server,
	}
	health := a.health.handler()
	a.probes.handler = health
	if a.cfg.probes.addr.Addr().IsLoopback() {
		a.probes.handler = status.LoopbackHandler(parts.Snapshot, health)
	}
	a.probeSocket.handler = explainHandler(parts, a.cfg.resolver, a.cfg.doctorSettings(), status.Handler(parts.Snapshot, health))
	a.metrics.handler = telemetry.Handler(a.parts())
	a.probeServer = &component{run: a.probeSocket.run}
	a.profiles = newProfilePage(profileAddress, a.log)
}

// parts is what metrics are made from.
func (a *agent) parts() telemetry.Parts {
	return telemetry.Parts{
		Rules: a.rules, Links: a.links, Pods: a.resolver, Upstream: a.upstream, Tokens: a.tokens, Server: a.server, Events: a.events,
		Ready: a.health.err, Version: version, Node: a.cfg.resolver.Node, Legacy: a.cfg.legacyMetrics,
	}
}

// pageListeners are those that a new agent is offered, see handover.
func (a *agent) pageListeners() map[string]*net.TCPListener {
	open := make(map[string]*net.TCPListener)
	for _, p := range []*page{a.probes, a.metrics} {
		if ln := p.tcpListener(); ln != nil {
			open[p.flag] = ln
		}
	}
	return open
}

// adopt makes the page use an inherited listener, unless that is nil.
func (p *page) adopt(ln *net.TCPListener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ln != nil {
		p.ln = ln
	}
}

// run serves until ctx ends. The listener stays open, for another agent or the next run.
func (p *page) run(ctx context.Context) {
	pause := firstRetry
	for {
		ln, err := p.open(ctx)
		if err == nil {
			pause = firstRetry
			if err = p.serve(ctx, ln); err == nil {
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		p.setError(err)
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxRetry)
		case <-p.retry:
			pause = firstRetry
		case <-ctx.Done():
			return
		}
	}
}

// open returns the listener, and listens first where needed.
func (p *page) open(ctx context.Context) (pageListener, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln == nil {
		ln, err := p.listen(ctx)
		if err != nil {
			return nil, err
		}
		p.ln = ln
	}
	if p.err != nil {
		p.log.Info("serving now", "flag", "--"+p.flag, "address", p.ln.Addr().String())
	}
	p.err = nil
	return p.ln, nil
}

// setError notes why nothing is served, and logs it once.
func (p *page) setError(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil || p.err.Error() != err.Error() {
		p.log.Warn("cannot serve; trying again", "flag", "--"+p.flag, "error", err)
	}
	p.err = err
}

// status is what /readyz says of the page, a line; "" for nothing.
func (p *page) status() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		return ""
	}
	return "--" + p.flag + " cannot be served; trying again: " + p.err.Error()
}

// retryNow ends the pause before the next attempt.
func (p *page) retryNow() {
	select {
	case p.retry <- struct{}{}:
	default:
	}
}

// tcpListener is the listener for another agent; nil if none is open.
func (p *page) tcpListener() *net.TCPListener {
	p.mu.Lock()
	defer p.mu.Unlock()
	tcp, _ := p.ln.(*net.TCPListener)
	return tcp
}

// close closes the listener.
func (p *page) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln != nil {
		_ = p.ln.Close()
		p.ln = nil
	}
}
