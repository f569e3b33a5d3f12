package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
)

const (
	goodRate        = 500 // requests a second
	goodConnections = 4
	// warmUp is not measured: programs start, and fight for the core.
	warmUp   = time.Second
	tokenURL = "http://" + testbed.MetadataAddress + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
)

// result is what the good pod saw.
type result struct {
	p50, p99 time.Duration
	failed   int
}

// ask asks at a steady rate, whatever the answers take, so that a slow one is not
// followed by fewer requests.
func ask(ctx context.Context, pod *testbed.Pod, length time.Duration) (result, error) {
	const each = time.Second * goodConnections / goodRate
	var mu sync.Mutex // guards took and failed
	var took []time.Duration
	failed := 0
	var asking sync.WaitGroup
	begin := time.Now().Add(warmUp)
	end := begin.Add(length)
	for i := range goodConnections {
		asking.Go(func() {
			client := pod.Client(10 * time.Second)
			defer client.CloseIdleConnections()
			for at := time.Now().Add(each * time.Duration(i) / goodConnections); at.Before(end) && ctx.Err() == nil; at = at.Add(each) {
				time.Sleep(time.Until(at))
				status, err := get(ctx, client, tokenURL)
				passed := time.Since(at)
				if at.Before(begin) {
					continue
				}
				mu.Lock()
				took = append(took, passed)
				if err != nil || status != http.StatusOK {
					failed++
				}
				mu.Unlock()
			}
		})
	}
	asking.Wait()
	if len(took) == 0 {
		return result{}, fmt.Errorf("no request was made: %w", ctx.Err())
	}
	slices.Sort(took)
	return result{p50: took[len(took)/2], p99: took[len(took)*99/100], failed: failed}, nil
}

func get(ctx context.Context, client *http.Client, url string) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}
