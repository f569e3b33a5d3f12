package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/cmd/nmi/status"
)

// Limits of a page's server. Every pod can reach those that listen on the node's
// address, so that what clients can make one hold is bounded by construction. Of one
// connection, at most:
//
//	30 KiB  heap, measured: net/http's buffers, 4 KiB of head
//	        and the page in a buffer that doubles when it grows: 60 KiB on the probe
//	        port, which has less; 210 KiB on the metrics port, whose page has 40 KiB,
//	        and 105 if pods send requests of all kinds (60 more with --legacy-metrics)
//	13 KiB  stacks, measured
//	40 KiB  socket buffers: twice what is asked for (socket(7), SO_RCVBUF)
//	 4 KiB  the kernel's sock, file and inode
//
// which is 147 KiB and 297 KiB, and 4.6 MiB and 9.3 MiB for 32 connections. Pods can reach
// both ports: 13.9 MiB together. The probe socket is a third, for root in the agent's own
// pod alone.
//
// Connections that have not been accepted hold kernel memory outside the container's
// limit, at most net.core.somaxconn (4096) for each port: the kernel charges a socket
// to the process that accepts it (inet_csk_accept).
const (
	// pageHeadTimeout is for the request line and the headers.
	pageHeadTimeout = 2 * time.Second
	// pageConnTimeout is the longest that a connection lives, from when it is accepted
	// until the client has received the page. Of it, 10 s are for rendering and
	// receiving: Prometheus's default scrape_timeout. A client that does not read gains
	// nothing by the long time: it could have its connections again at once.
	pageConnTimeout = pageHeadTimeout + 10*time.Second

	// After a page that took a while to render the next waits for 19 times as long, so
	// that clients that ask without end get about a twentieth of a core: /metrics
	// takes some milliseconds. The pause is bounded, since all 32 connections may
	// have to wait for their turns, and Prometheus waits for 10 s.
	renderPause    = 19
	maxRenderPause = 100 * time.Millisecond

	// Socket buffers, in bytes. The kernel doubles them (socket(7), SO_RCVBUF).
	pageReceiveBuffer = 4 << 10
	pageSendBuffer    = 16 << 10
)

// serve answers requests until ctx ends, when it returns nil, or the listener
// fails. It leaves the listener open, and no connection.
func (p *page) serve(ctx context.Context, ln pageListener) error {
	if !p.nodeOnly {
		if err := limitSocketBuffers(ln); err != nil {
			return err
		}
	}
	file, err := ln.File() // a duplicate, for http.Server to close
	if err != nil {
		return err
	}
	duplicate, err := net.FileListener(file)
	_ = file.Close()
	if err != nil {
		return err
	}
	if p.nodeOnly {
		return serveNodeOnly(ctx, duplicate, p.handler, p.log)
	}
	limited := &limitedListener{Listener: duplicate, ctx: ctx}
	defer limited.open.Wait()
	// TimeoutHandler keeps a page in memory until it is complete, so that a client
	// that reads slowly does not hold up the next.
	handler := limitStatus(http.TimeoutHandler(oneAtATime(p.handler), pageConnTimeout, ""))
	server := http.Server{
		// Without the context of net/http, which ends when the client closes its side:
		// some do that as soon as they have sent the request (busybox nc).
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r.WithContext(ctx)) }),
		ReadHeaderTimeout: pageHeadTimeout,
		MaxHeaderBytes:    1,                                                   // net/http adds 4 KiB to it
		ErrorLog:          slog.NewLogLogger(p.log.Handler(), slog.LevelError), // panics of the handler, failing accepts
	}
	server.SetKeepAlivesEnabled(false)
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.Serve(limited); ctx.Err() == nil {
		return err
	}
	return nil
}

// limitSocketBuffers fixes the buffers of the connections that the listener will
// accept. They have it from the listener (tcp(7)), and so have it before the first
// byte comes.
func limitSocketBuffers(ln syscall.Conn) error {
	raw, err := ln.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	err = raw.Control(func(fd uintptr) {
		failure = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, pageReceiveBuffer),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, pageSendBuffer))
	})
	return errors.Join(err, failure)
}

// limitStatus has one status page in memory at a time, until its client has received it, and
// answers 503 to another request meanwhile. That page is larger than all others: 4 MiB if each of
// a node's 250 pods does what it can to make it long.
func limitStatus(handler http.Handler) http.Handler {
	var mu sync.Mutex // held while a page is in memory
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == status.Page {
			if !mu.TryLock() {
				http.Error(w, "another client is reading the status; try again in some seconds", http.StatusServiceUnavailable)
				return
			}
			defer mu.Unlock()
		}
		handler.ServeHTTP(w, r)
	})
}

// oneAtATime calls the handler for one request after another, with a pause between them.
func oneAtATime(handler http.Handler) http.Handler {
	var mu sync.Mutex // held while a page is rendered; guards next
	var next time.Time
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		select {
		case <-time.After(time.Until(next)):
		case <-r.Context().Done():
			return
		}
		start := time.Now()
		defer func() { next = time.Now().Add(min(renderPause*time.Since(start), maxRenderPause)) }()
		handler.ServeHTTP(w, r)
	})
}
