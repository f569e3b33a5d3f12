//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/deploy/testbed"
)

// load is pods that never stop asking. Unlike http.Client it repeats nothing: a
// connection that ends where an answer was due is a failure.
type load struct {
	sent, failed atomic.Int64
	first        atomic.Pointer[string] // failure
	url          func() string
	stop         chan struct{}
	asking       sync.WaitGroup
}

// startLoad begins with some connections that are kept alive and some that are
// made for each request, all for one token.
func startLoad(p *pod, keptAlive, fresh int) *load {
	return startLoadOf(p, keptAlive, fresh, func() string { return tokenURL + vault })
}

// startLoadOf is startLoad with a URL for each request.
func startLoadOf(p *pod, keptAlive, fresh int, url func() string) *load {
	l := &load{stop: make(chan struct{}), url: url}
	for i := range keptAlive + fresh {
		l.asking.Go(func() { l.ask(p, i < keptAlive) })
	}
	return l
}

// losesNothing ends the load, asserts that nothing has failed, and says how much was sent.
func (l *load) losesNothing(t *testing.T) {
	t.Helper()
	sent, failed, first := l.end()
	assert.Zero(t, failed, first)
	assert.Positive(t, sent)
	t.Logf("requests sent: %d, failed: %d", sent, failed)
}

// end stops the load and returns what it counted.
func (l *load) end() (sent, failed int64, first string) {
	close(l.stop)
	l.asking.Wait()
	if f := l.first.Load(); f != nil {
		first = *f
	}
	return l.sent.Load(), l.failed.Load(), first
}

func (l *load) ask(p *pod, keepAlive bool) {
	var conn net.Conn
	var r *bufio.Reader
	for {
		select {
		case <-l.stop:
			if conn != nil {
				_ = conn.Close()
			}
			return
		default:
		}
		l.sent.Add(1)
		err := func() error {
			if conn == nil {
				var err error
				if conn, err = p.DialContext(p.t.Context(), "tcp", testbed.MetadataAddress); err != nil {
					return err
				}
				r = bufio.NewReader(conn)
			}
			_ = conn.SetDeadline(time.Now().Add(patience))
			request := strings.Replace(l.url(), "http://"+testbed.MetadataAddress, "", 1)
			if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n", request); err != nil {
				return err
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				return err
			}
			if resp.StatusCode != http.StatusOK {
				return fmt.Errorf("status %d", resp.StatusCode)
			}
			if resp.Close || !keepAlive {
				_ = conn.Close()
				conn = nil
			}
			return nil
		}()
		if err != nil {
			l.failed.Add(1)
			text := err.Error()
			l.first.CompareAndSwap(nil, &text)
			if conn != nil {
				_ = conn.Close()
				conn = nil
			}
		}
	}
}
