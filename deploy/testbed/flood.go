package testbed

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Flood is a pod that sends requests and reads no answer.
type Flood struct {
	Opened, Closed atomic.Int64 // connections, and those that the agent has closed

	stop    context.CancelFunc
	sending sync.WaitGroup
}

// StartFlood keeps so many connections to the metadata service open, sends text on each
// again and again, and reads nothing. One that is closed is opened anew.
func (n *Namespace) StartFlood(ctx context.Context, connections int, text string) *Flood {
	f := new(Flood)
	ctx, f.stop = context.WithCancel(ctx)
	dialling := make(chan struct{}, 8) // keeps the threads that are in the pod's namespace few
	for range connections {
		f.sending.Go(func() {
			for ctx.Err() == nil {
				dialling <- struct{}{}
				conn, err := n.DialContext(ctx, "tcp", MetadataAddress)
				<-dialling
				if err != nil {
					select { // the agent has no place, or has ended
					case <-time.After(100 * time.Millisecond):
					case <-ctx.Done():
					}
					continue
				}
				f.Opened.Add(1)
				sendOn(ctx, conn, text)
				f.Closed.Add(1)
			}
		})
	}
	return f
}

// sendOn writes until the other side has closed, or ctx ends.
func sendOn(ctx context.Context, conn net.Conn, text string) {
	defer conn.Close()
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetReadBuffer(0) // so that little fits into it
		_ = tcp.SetLinger(0)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	for {
		if _, err := conn.Write([]byte(text)); err != nil {
			return
		}
	}
}

// Stop ends the flood, and waits until it has.
func (f *Flood) Stop() {
	f.stop()
	f.sending.Wait()
}

// TinyFields is a request for a token whose head has n fields of six bytes, all of them
// different.
func TinyFields(n int) string {
	var b strings.Builder
	b.WriteString("GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net HTTP/1.1\r\nHost: h\r\nMetadata: true\r\n")
	for i := range n {
		fmt.Fprintf(&b, "%c%c%c:\r\n", 'a'+i%26, 'a'+i/26%26, 'a'+i/676)
	}
	b.WriteString("\r\n")
	return b.String()
}

// LargeHead is a request for a token with as many lines as a head may have, of 8 KiB.
func LargeHead() string {
	head := strings.TrimSuffix(TinyFields(0), "\r\n")
	const fields = 64 - 4 - 1
	for i := range fields {
		head += fmt.Sprintf("X%d: %s\r\n", i, strings.Repeat("x", 120))
	}
	return head + "\r\n"
}
