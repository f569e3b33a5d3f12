package listener

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What is kept of a caller is dropped with its last connection, or when its share of the CPU
// is as good as new.
func TestCallersAreForgotten(t *testing.T) { synctest.Test(t, testCallersAreForgotten) }

func testCallersAreForgotten(t *testing.T) {
	l := NewLimiter(10, 5)
	addr := netip.MustParseAddr
	admit := func(from string) *Conn {
		here, there := net.Pipe()
		t.Cleanup(func() { _ = there.Close() })
		c, ok := l.admit(addressed{here, from}).(*Conn)
		require.True(t, ok)
		return c
	}
	silent, busy, acquired := admit("10.0.0.1"), admit("10.0.0.2"), admit("10.0.0.3")
	l.ConnState(busy, http.StateActive)
	require.True(t, acquired.Acquire(1))
	assert.False(t, acquired.Acquire(1))
	assert.Equal(t, Stats{Open: 3, Busy: 1}, l.Stats())
	for _, c := range []*Conn{silent, busy, acquired} {
		require.NoError(t, c.Close())
		require.NoError(t, c.Close(), "twice")
	}
	assert.Equal(t, Stats{}, l.Stats())
	assert.Len(t, l.callers, 3, "they have connected just now")
	turn := func() {
		time.Sleep(paceWindow)
		l.delayLocked(new(caller), 1, time.Now())
	}
	turn()
	turn()
	assert.NotContains(t, l.callers, addr("10.0.0.1"))
	assert.NotContains(t, l.callers, addr("10.0.0.2"))
	assert.Contains(t, l.callers, addr("10.0.0.3"), "it has a request")
	acquired.Release()
	assert.Empty(t, l.callers)
}

// addressed is a connection from a caller.
type addressed struct {
	net.Conn
	from string
}

func (c addressed) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(c.from), Port: 40000} }

// What the kernel may hold for a connection is fixed: twice what is asked for (socket(7)).
func TestFixBuffers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.2:0")
	require.NoError(t, err)
	defer ln.Close()
	require.NoError(t, FixBuffers(OnlyRedirected(ln, netip.AddrPort{})))
	var dialing sync.WaitGroup
	defer dialing.Wait()
	dialing.Go(func() {
		c, err := net.Dial("tcp", ln.Addr().String())
		if assert.NoError(t, err) {
			_ = c.Close()
		}
	})
	accepted, err := ln.Accept()
	require.NoError(t, err)
	defer accepted.Close()
	require.NoError(t, control(accepted, func(fd int) error {
		received, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
		assert.Equal(t, 2*receiveBuffer, received)
		sent, sendErr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
		assert.Equal(t, 2*sendBuffer, sent)
		return errors.Join(err, sendErr)
	}))
}
