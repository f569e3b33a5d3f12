package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
)

const (
	maxPageConns = 32
	// The last are kept for the node itself, whose kubelet may probe by the port.
	pageConnsForNode = 2
	// One address may have so many connections, but only one when more than a
	// quarter of all are in use: it takes 24 addresses to keep others out.
	maxPageConnsPerAddr = 4
	scarcePageConns     = maxPageConns / 4

	maxPageHeadLines = 64
)

// limitedListener accepts a bounded number of connections, resets those above it,
// and resets each that is still open after pageConnTimeout or when ctx ends.
type limitedListener struct {
	net.Listener
	ctx  context.Context
	open sync.WaitGroup

	mu     sync.Mutex // guards what follows
	total  int
	byAddr map[netip.Addr]int
}

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		release, ok := l.admit(conn)
		if !ok {
			resetConn(conn)
			continue
		}
		l.open.Add(1)
		ctx, end := context.WithTimeout(l.ctx, pageConnTimeout)
		context.AfterFunc(ctx, func() { resetConn(conn) })
		return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { end(); resetConn(conn); release(); l.open.Done() })}, nil
	}
}

// limitedConn counts until it has been closed, by the client too or by a reset.
type limitedConn struct {
	net.Conn
	release func()
	lines   int // read
}

var errTooManyLines = errors.New("request has too many lines")

// Read fails, for which net/http answers 400, before a line too many has come: 4 KiB of
// "a:" lines would become 150 KiB of headers.
func (c *limitedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.lines += bytes.Count(b[:n], []byte("\n")); c.lines > maxPageHeadLines {
		return 0, errTooManyLines
	}
	return n, err
}

// Close waits for the client to close, which it does when it has received the page.
// Closed earlier, a socket with data that the client has not acknowledged would live on
// in the kernel, and not count. TCP_USER_TIMEOUT bounds for how long, but nothing how
// many.
func (c *limitedConn) Close() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, c.Conn, pageReceiveBuffer)
	}
	c.release()
	return nil
}

// resetConn closes a connection without leaving anything of it in the kernel. What
// the client has received it keeps.
func resetConn(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// admit counts the connection, or reports that there are too many, of its address
// or of all. Those of a Unix socket have no address, and count together only.
func (l *limitedListener) admit(conn net.Conn) (release func(), ok bool) {
	from, to := addrOf(conn.RemoteAddr()), addrOf(conn.LocalAddr())
	most, mostOfAddr := maxPageConns, maxPageConnsPerAddr
	l.mu.Lock()
	defer l.mu.Unlock()
	if from != to { // not from the node itself: a pod cannot complete a handshake with the node's own address
		most -= pageConnsForNode
		if l.total >= scarcePageConns {
			mostOfAddr = 1
		}
	}
	if l.total >= most || from.IsValid() && l.byAddr[from] >= mostOfAddr {
		return nil, false
	}
	if l.byAddr == nil {
		l.byAddr = make(map[netip.Addr]int)
	}
	l.total++
	l.byAddr[from]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.total--
		if l.byAddr[from]--; l.byAddr[from] == 0 {
			delete(l.byAddr, from)
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
