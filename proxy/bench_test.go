package proxy

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// BenchmarkConnection is a cached token over loopback, client and all, on a connection
// that is kept alive and on a new one each. What matters is cpu-ns/op: it bears other
// programs on the machine better than the time does.
func BenchmarkConnection(b *testing.B) {
	for name, keepAlive := range map[string]bool{"kept alive": true, "new": false} {
		b.Run(name, func(b *testing.B) { benchmarkConnection(b, keepAlive) })
	}
}

func benchmarkConnection(b *testing.B, keepAlive bool) {
	b.Helper()
	s, _, _ := cached(b)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(b, err)
	ctx, stop := context.WithCancel(b.Context())
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(ctx, ln) })
	defer serving.Wait()
	defer stop()

	raw := get(tokenURL)
	if !keepAlive {
		raw = get(tokenURL, "Connection: close")
	}
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(bound), 0))}
	var conn net.Conn
	var answers *bufio.Reader
	before := cpuTime(b)
	for b.Loop() {
		if conn == nil || !keepAlive {
			conn, err = dialer.DialContext(ctx, "tcp", ln.Addr().String())
			require.NoError(b, err)
			answers = bufio.NewReader(conn)
		}
		_, err = io.WriteString(conn, raw)
		require.NoError(b, err)
		resp, err := http.ReadResponse(answers, nil)
		require.NoError(b, err)
		_, _ = io.Copy(io.Discard, resp.Body)
		if !keepAlive {
			_ = conn.Close()
		}
	}
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
	_ = conn.Close()
}

// cpuTime is what the process has used so far, in nanoseconds.
func cpuTime(b *testing.B) int64 {
	b.Helper()
	var used unix.Rusage
	require.NoError(b, unix.Getrusage(unix.RUSAGE_SELF, &used))
	return used.Utime.Nano() + used.Stime.Nano()
}
