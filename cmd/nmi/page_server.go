package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a pageServer. Every pod can reach the ports that it listens on, on the
// node's address, so that what callers can make it hold is bounded by construction.
//
// Of one connection, at most:
//
//	16 KiB  stack of its goroutine
//	 4 KiB  request head, and 8 KiB for the http.Request with its 64 headers
//	64 KiB  page (/metrics has 30 KiB now, in a buffer that doubles)
//	40 KiB  socket buffers: twice what is asked for (socket(7), SO_RCVBUF)
//	 4 KiB  the kernel's sock, file and inode
//
// which is 136 KiB, and 4.25 MiB for the 32 connections of a server. Pods can reach
// two servers, of the probe port and of the metrics port: 8.5 MiB together. The probe
// socket is a third, for root in the agent's own pod alone. One page at a time is
// rendered by each, which takes some 0.5 MiB more.
//
// Connections that have not been accepted hold kernel memory outside the container's
// limit, at most net.core.somaxconn (4096) for each port: the kernel charges a socket
// to the process that accepts it (inet_csk_accept).
const (
	maxPageConns = 32
	// The last are kept for the node itself, whose kubelet may probe by the port.
	pageConnsForNode = 2
	// One address may have so many connections, but only one when more than a
	// quarter of all are in use: it takes 24 addresses to keep others out.
	maxPageConnsPerAddr = 4
	scarcePageConns     = maxPageConns / 4

	maxPageHead      = 4 << 10 // bytes
	maxPageHeadLines = 64
	// pageHeadTimeout is for a request to come, from when the connection is accepted.
	pageHeadTimeout = 2 * time.Second
	// pageAnswerTimeout is for the page to be written and the client to have
	// received it. It is Prometheus's default scrape_timeout; over a lossy link 30 KiB can
	// take longer than 2 s. A client that does not read gains nothing by the longer time:
	// it can have its connections again at once.
	pageAnswerTimeout = 10 * time.Second

	// After a page that took a while to render the next waits for 19 times as long, so
	// that clients that ask without end get about a twentieth of a core: /metrics
	// takes some milliseconds. The pause is bounded, since all 32 connections may
	// have to wait for their turns, and Prometheus waits for 10 s.
	renderPause    = 19
	maxRenderPause = 100 * time.Millisecond

	pageReceiveBuffer = 4 << 10
	pageSendBuffer    = 16 << 10
)

// pageServer answers requests for pages of text: /metrics, /healthz and /readyz.
//
// The life of a connection: it is accepted, or reset when there are too many; its
// request head is read into a small buffer; the page is rendered to memory, one at a
// time; the page is written; the client closes. There is one request a connection.
//
// It is no http.Server because that one keeps up to 1,365 headers for as long as a
// client likes to take over the last, renders while it writes, and leaves an answer
// that the client does not read to the kernel, where nothing counts these.
type pageServer struct {
	handler http.Handler
	log     *slog.Logger

	rendering sync.Mutex // held while a page is rendered; guards next
	next      time.Time  // when the next page may be rendered

	mu     sync.Mutex // guards what follows
	total  int
	byAddr map[netip.Addr]int
}

func newPageServer(handler http.Handler, log *slog.Logger) *pageServer {
	return &pageServer{handler: handler, log: log, byAddr: make(map[netip.Addr]int)}
}

// pageListener is a TCP or Unix listener.
type pageListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(t time.Time) error
}

// serve answers what comes to the listener until ctx ends, when it returns nil, or
// the listener fails. It leaves the listener open, and no connection.
func (s *pageServer) serve(ctx context.Context, ln pageListener) error {
	if err := limitSocketBuffers(ln); err != nil {
		return err
	}
	if err := ln.SetDeadline(time.Time{}); err != nil { // that of the last time
		return err
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(woken); _ = ln.SetDeadline(past) })
	defer func() {
		if !stop() {
			<-woken // or it might end the next run
		}
	}()
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				resetConn(conn)
			}
			return nil
		}
		if err != nil {
			return err
		}
		release, ok := s.admit(conn)
		if !ok {
			resetConn(conn)
			continue
		}
		open.Go(func() {
			defer release()
			defer resetConn(conn)
			defer context.AfterFunc(ctx, func() { resetConn(conn) })()
			s.answer(ctx, conn)
		})
	}
}

// limitSocketBuffers fixes the buffers of the connections that the listener will
// accept. They have it from the listener (tcp(7)), and so have it before the first
// byte comes.
func limitSocketBuffers(ln pageListener) error {
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

// admit counts the connection, or reports that there are too many, of its address
// or of all. Those of a Unix socket have no address, and count together only.
func (s *pageServer) admit(conn net.Conn) (release func(), ok bool) {
	from, to := addrOf(conn.RemoteAddr()), addrOf(conn.LocalAddr())
	most, mostOfAddr := maxPageConns, maxPageConnsPerAddr
	s.mu.Lock()
	defer s.mu.Unlock()
	if from != to { // not from the node itself: a pod cannot complete a handshake with the node's own address
		most -= pageConnsForNode
		if s.total >= scarcePageConns {
			mostOfAddr = 1
		}
	}
	if s.total >= most || from.IsValid() && s.byAddr[from] >= mostOfAddr {
		return nil, false
	}
	s.total++
	s.byAddr[from]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.total--
		if s.byAddr[from]--; s.byAddr[from] == 0 {
			delete(s.byAddr, from)
		}
	}, true
}

// addrOf is the IP address; the zero Addr for Unix sockets.
func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// answer reads one request and writes the page.
func (s *pageServer) answer(ctx context.Context, conn net.Conn) {
	_ = conn.SetDeadline(time.Now().Add(pageHeadTimeout))
	req, status := readPageRequest(ctx, conn)
	if status == 0 {
		return
	}
	page := s.render(ctx, req, status)
	_ = conn.SetDeadline(time.Now().Add(pageAnswerTimeout))
	if _, err := conn.Write(page); err != nil {
		return
	}
	// Closed with data that the client has not received, a socket would live on in
	// the kernel for minutes, and nothing bounds how many do. So the client closes
	// first, or the connection is reset at the deadline.
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, conn, maxPageHead)
	}
}

// readPageRequest reads a request's head. Status 0 means that none came; any other
// than 200, that the request is refused with it and nil.
func readPageRequest(ctx context.Context, conn io.Reader) (req *http.Request, status int) {
	head := make([]byte, 0, maxPageHead)
	for {
		n, err := conn.Read(head[len(head):cap(head)])
		head = head[:len(head)+n]
		if bytes.Count(head, []byte("\n")) > maxPageHeadLines {
			return nil, http.StatusRequestHeaderFieldsTooLarge
		}
		if bytes.Contains(head, []byte("\n\r\n")) || bytes.Contains(head, []byte("\n\n")) {
			break
		}
		if err != nil {
			return nil, 0
		}
		if len(head) == cap(head) {
			return nil, http.StatusRequestHeaderFieldsTooLarge
		}
	}
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
	if err != nil {
		return nil, http.StatusBadRequest
	}
	req.Body = http.NoBody // the pages take none
	return req.WithContext(ctx), http.StatusOK
}

// resetConn closes a connection without leaving anything of it in the kernel. What
// the client has received it keeps.
func resetConn(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
