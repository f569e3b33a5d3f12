package listener

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// connected returns an admitted connection over TCP, and its client.
func connected(t *testing.T, l *Limiter) (c *Conn, client *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	require.NoError(t, FixBuffers(ln))
	dialed, err := new(net.Dialer).DialContext(t.Context(), "tcp", ln.Addr().String())
	require.NoError(t, err)
	accepted, err := l.Listener(ln).Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _ = accepted.Close(); _ = dialed.Close() })
	return accepted.(*Conn), dialed.(*net.TCPConn)
}

const nextTimeout = time.Minute

func TestNext(t *testing.T) {
	c, client := connected(t, NewLimiter(8, 8))
	next := func() string {
		t.Helper()
		request, err := c.Next(nextTimeout)
		require.NoError(t, err)
		return string(request)
	}
	send := func(text string) {
		t.Helper()
		_, err := io.WriteString(client, text)
		require.NoError(t, err)
	}
	send("one")
	assert.Equal(t, "one", next())
	require.NoError(t, c.Respond([]byte("answer")))
	answer := make([]byte, 6)
	_, err := io.ReadFull(client, answer)
	require.NoError(t, err)
	assert.Equal(t, "answer", string(answer))
	send("two")
	assert.Equal(t, "two", next())

	// To an http.Server, and back.
	send("three")
	c.HandOver()
	read := make([]byte, 64)
	n, err := c.Read(read)
	require.NoError(t, err)
	assert.Equal(t, "two", string(read[:n]))
	n, err = c.Read(read)
	require.NoError(t, err)
	assert.Equal(t, "three", string(read[:n]))
	assert.True(t, c.TakeBack(nil))
	send("four")
	assert.Equal(t, "four", next())
	c.HandOver()
	assert.False(t, c.TakeBack([]byte("early ")), "there is more than one request")
	assert.True(t, c.Pipelined())
	n, err = c.Read(read)
	require.NoError(t, err)
	assert.Equal(t, "early four", string(read[:n]))

	assert.True(t, c.TakeBack(nil))
	require.NoError(t, client.CloseWrite())
	_, err = c.Next(nextTimeout)
	assert.ErrorIs(t, err, io.EOF)
}

// A response that the kernel does not take at once is written all the same.
func TestRespondToSlowReader(t *testing.T) {
	c, client := connected(t, NewLimiter(8, 8))
	require.NoError(t, client.SetReadBuffer(0))
	long := strings.Repeat("0123456789", 5_000)
	var sending sync.WaitGroup
	sending.Go(func() { assert.NoError(t, c.Respond([]byte(long))); assert.NoError(t, c.Close()) })
	got, err := io.ReadAll(client)
	require.NoError(t, err)
	assert.Equal(t, long, string(got))
	sending.Wait()
}

func TestNextTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, client := net.Pipe()
		defer client.Close()
		l := NewLimiter(8, 8)
		c, ok := l.admit(addressed{server, greedy.String()}).(*Conn)
		require.True(t, ok)
		for range 10 { // the deadline is not set for each
			go func() { time.Sleep(nextTimeout / 4); _, _ = client.Write([]byte("x")) }()
			_, err := c.Next(nextTimeout)
			require.NoError(t, err)
		}
		began := time.Now()
		_, err := c.Next(nextTimeout)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		assert.GreaterOrEqual(t, time.Since(began), nextTimeout/2)
		assert.LessOrEqual(t, time.Since(began), nextTimeout)
	})
}

// A process that gets no time to run notices a request and the deadline after it at once.
func TestNextAfterTheDeadline(t *testing.T) {
	c, client := connected(t, NewLimiter(8, 8))
	const passed = -time.Second
	_, err := c.Next(passed)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)

	_, err = io.WriteString(client, "in time")
	require.NoError(t, err)
	require.NoError(t, client.CloseWrite())
	var request []byte
	require.EventuallyWithT(t, func(t *assert.CollectT) { // until the kernel has delivered it
		request, err = c.Next(passed)
		require.NoError(t, err)
	}, 10*time.Second, time.Millisecond)
	assert.Equal(t, "in time", string(request))
	_, err = c.Next(passed)
	assert.ErrorIs(t, err, io.EOF)
}

func TestEndNext(t *testing.T) {
	l := NewLimiter(8, 8)
	waiting, _ := connected(t, l)
	served, client := connected(t, l)
	served.HandOver()
	ended := make(chan error, 1)
	go func() {
		_, err := waiting.Next(nextTimeout)
		ended <- err
	}()
	for done := false; !done; {
		l.EndNext()
		select {
		case err := <-ended:
			assert.ErrorIs(t, err, os.ErrDeadlineExceeded)
			done = true
		case <-time.After(time.Millisecond): // it had not begun to wait
		}
	}
	_, err := client.Write([]byte("x"))
	require.NoError(t, err)
	_, err = served.Read(make([]byte, 1))
	assert.NoError(t, err, "it is an http.Server's")
}

// A request on the fast path is held back like any other, and until its connection is evicted.
func TestAwaitTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(1, 8)
		l.pace.cpus = func() int { return 1 }
		another := &caller{addr: netip.MustParseAddr("10.0.0.9")}
		l.delayLocked(another, 1, time.Now())
		server, client := net.Pipe()
		defer client.Close()
		c, ok := l.admit(addressed{server, greedy.String()}).(*Conn)
		require.True(t, ok)
		const each = 2 * float64(initialCost) / busyShare // for one of two callers
		began := time.Now()
		for range paceBurst - connectionCost + 10 {
			c.AwaitTurn()
			assert.Zero(t, l.Stats().Busy)
		}
		assert.InDelta(t, 10*each, time.Since(began), float64(time.Microsecond))

		l.delayLocked(another, 1, time.Now()) // so that there are still two
		l.pace.delay(&c.caller.share, 1<<20, time.Now())
		began = time.Now()
		var waiting sync.WaitGroup
		waiting.Go(func() { c.AwaitTurn() })
		synctest.Wait()
		assert.Equal(t, 1, l.Stats().Busy)
		l.mu.Lock()
		l.evictLocked(c.place)
		l.mu.Unlock()
		waiting.Wait()
		assert.Zero(t, time.Since(began))
	})
}

// Eviction ends the requests that an http.Server serves, however often it was given the
// connection.
func TestEvictionCancelsRequests(t *testing.T) {
	l := NewLimiter(8, 8)
	c, _ := connected(t, l)
	l.ConnContext(t.Context(), c)
	ctx := l.ConnContext(t.Context(), c)
	l.ConnState(c, http.StateActive)
	require.NoError(t, ctx.Err())
	l.mu.Lock()
	l.evictLocked(c.place)
	l.mu.Unlock()
	assert.Error(t, ctx.Err())
	assert.Error(t, l.ConnContext(t.Context(), c).Err(), "it has been evicted already")
}

func TestDrain(t *testing.T) {
	l := NewLimiter(8, 8)
	c, _ := connected(t, l)
	empty := l.Drain()
	select {
	case <-empty:
		t.Fatal("a connection is open")
	default:
	}
	require.NoError(t, c.Close())
	<-empty
	<-NewLimiter(8, 8).Drain()
}
