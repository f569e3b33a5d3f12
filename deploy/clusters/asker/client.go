package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	neturl "net/url"
	"slices"
	"strconv"
	"time"

	"github.com/podidentity/nmi/deploy/clusters/asker/answers"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// client asks, and tries again if it is to.
type client struct {
	http   *http.Client
	header http.Header
	retry  bool
}

// How azidentity v1.15 tries again (setIMDSRetryOptionDefaults, and azcore's retry
// policy): at most six times more, after 2 s, 6 s, 14 s and then 25 s each, or what
// Retry-After says; here without its jitter.
const (
	maxRetries    = 6
	retryDelay    = 2 * time.Second
	maxRetryDelay = 25 * time.Second
)

func isRetried(status int) bool {
	return status == 0 || status >= 500 || slices.Contains([]int{http.StatusNotFound, http.StatusGone, http.StatusTooManyRequests}, status)
}

func (c client) ask(ctx context.Context, url string) answers.Answer {
	begin := time.Now()
	var a answers.Answer
	var failures []string
	for try := range maxRetries + 1 {
		tried := time.Now()
		a = c.try(ctx, url)
		a.Tries = try + 1
		if !c.retry || !isRetried(a.Status) || try == maxRetries {
			break
		}
		delay := min(retryDelay*(1<<(try+1)-1), maxRetryDelay)
		if seconds, err := strconv.Atoi(a.RetryAfter); err == nil {
			delay = time.Duration(seconds) * time.Second
		}
		failures = append(failures, fmt.Sprintf("%d after %d ms, %s", a.Status, time.Since(tried).Milliseconds(), a.Error))
		if !pause(ctx, delay, true) {
			break
		}
	}
	a.Failures = failures
	a.Time, a.Millis = begin.UTC(), float64(time.Since(begin).Microseconds())/1000
	return a
}

// maxShown is how much is written of an answer that is not a token.
const maxShown = 300

func (c client) try(ctx context.Context, url string) (a answers.Answer) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		a.Error = err.Error()
		return a
	}
	req.Header = c.header
	resp, err := c.http.Do(req)
	if err != nil {
		if of := (*neturl.Error)(nil); errors.As(err, &of) {
			err = of.Err // which URL is known
		}
		a.Error = err.Error()
		return a
	}
	defer resp.Body.Close()
	a.RetryAfter = resp.Header.Get("Retry-After")
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		a.Error = err.Error() // it began to answer, and failed: status 0
		return a
	}
	a.Status = resp.StatusCode
	// IMDS's answer, and within it that of /host/token.
	var token struct {
		Text string `json:"access_token"`
		Host struct {
			Text string `json:"access_token"`
		} `json:"token"`
	}
	if json.Unmarshal(body, &token) == nil {
		a.Subject = imdstest.Subject(token.Text + token.Host.Text)
	}
	if a.Subject == "" {
		a.Error = string(body[:min(len(body), maxShown)])
	}
	return a
}
