package listener

import (
	"net"
	"net/netip"
)

// OnlyIdentified wraps a TCP listener so that Accept returns only connections whose caller
// identify knows, and the node's own, see Conn.Loopback. A caller is then what identify returns
// instead of the address that the connection came from: that is what Conn.Caller and
// http.Request.RemoteAddr say. Any other connection is reset before a byte is read.
func OnlyIdentified(ln net.Listener, identify func(*net.TCPConn) (netip.Addr, error)) net.Listener {
	return &identifiedListener{redirectedListener{Listener: ln}, identify}
}

type identifiedListener struct {
	redirectedListener
	identify func(*net.TCPConn) (netip.Addr, error)
}

func (l *identifiedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if isLoopback(conn) {
			return conn, nil
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			if caller, err := l.identify(tcp); err == nil {
				port := tcpAddr(tcp.RemoteAddr()).Port()
				return &identifiedConn{tcp, net.TCPAddrFromAddrPort(netip.AddrPortFrom(caller, port))}, nil
			}
		}
		reset(conn)
	}
}

// identifiedConn is a connection from a caller that is known by something else than its address.
type identifiedConn struct {
	*net.TCPConn
	from *net.TCPAddr
}

// RemoteAddr is the caller, and the port that the connection came from.
func (c *identifiedConn) RemoteAddr() net.Addr { return c.from }
