package proxy

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

// pipes is a listener whose connections are two pipes each, so that either side can
// finish sending and go on reading, as with TCP. To whoever accepts from it they come
// from a pod's address. The fuzzers use it: the kernel's connections cost five times
// as much, and its ports run out.
type pipes struct {
	accept chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newPipes() *pipes {
	return &pipes{accept: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

func (l *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(169, 254, 169, 254), Port: 80} }

// dial connects from the address of a pod; nil when the listener is closed.
func (l *pipes) dial(from string) *pipe {
	toServer, fromClient := net.Pipe()
	toClient, fromServer := net.Pipe()
	pod := net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 40000))
	select {
	case l.accept <- &pipe{r: toServer, w: fromServer, local: l.Addr(), remote: pod}:
		return &pipe{r: toClient, w: fromClient, local: pod, remote: l.Addr()}
	case <-l.closed:
		return nil
	}
}

// pipe is one side of a connection.
type pipe struct {
	r, w          net.Conn
	local, remote net.Addr
}

func (p *pipe) Read(b []byte) (int, error)         { return p.r.Read(b) }
func (p *pipe) Write(b []byte) (int, error)        { return p.w.Write(b) }
func (p *pipe) CloseWrite() error                  { return p.w.Close() }
func (p *pipe) Close() error                       { return errors.Join(p.r.Close(), p.w.Close()) }
func (p *pipe) LocalAddr() net.Addr                { return p.local }
func (p *pipe) RemoteAddr() net.Addr               { return p.remote }
func (p *pipe) SetReadDeadline(t time.Time) error  { return p.r.SetReadDeadline(t) }
func (p *pipe) SetWriteDeadline(t time.Time) error { return p.w.SetWriteDeadline(t) }
func (p *pipe) SetDeadline(t time.Time) error {
	return errors.Join(p.r.SetDeadline(t), p.w.SetDeadline(t))
}
