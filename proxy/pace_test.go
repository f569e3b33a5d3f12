package proxy

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

// See proxy/listener/pace.go.
const (
	sharedRate = 16_000
	paceBurst  = 8
)

// The requests of one connection wait like those of many, and without end or harm.
func TestTheServerPacesRequests(t *testing.T) {
	for name, shape := range map[string]struct{ connections, each int }{
		"many connections": {DefaultMaxConnectionsPerPod, 4},
		"pipelined":        {1, 4 * DefaultMaxConnectionsPerPod},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := newPipes()
				ctx, stop := context.WithCancel(t.Context())
				var serving, asking sync.WaitGroup
				serving.Go(func() { assert.NoError(t, New(Config{}).Serve(ctx, ln)) })
				defer serving.Wait()
				defer stop()
				ask := func(from string, requests int) {
					conn := ln.dial(from)
					defer conn.Close()
					asking.Go(func() {
						for range requests {
							_, _ = io.WriteString(conn, "GET "+tokenURL+" HTTP/1.1\r\nHost: imds\r\n\r\n")
						}
					})
					answers := bufio.NewReader(conn)
					for range requests {
						resp, err := http.ReadResponse(answers, nil)
						if !assert.NoError(t, err) {
							return
						}
						assert.Equal(t, http.StatusBadRequest, resp.StatusCode)
						_, _ = io.Copy(io.Discard, resp.Body)
					}
				}
				began := time.Now()
				ask(alsoBound, paceBurst)
				assert.Zero(t, time.Since(began), "one pod alone")
				for range shape.connections {
					asking.Go(func() { ask(bound, shape.each) })
				}
				asking.Wait()
				all := shape.connections * shape.each
				assert.Equal(t, time.Duration(all-paceBurst)*time.Second*2/sharedRate, time.Since(began))
			})
		})
	}
}
