package upstream

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// exchange carries the requests of one fetch to Entra, and remembers how the last
// of them ended. The credentials that send them tell of failures in texts, some of
// which quote what came: a token, if it was not quite as expected. So what went
// wrong is read here, and their texts are left alone.
type exchange struct {
	client    *http.Client
	hosts     map[string]bool // that may be asked, see entra.allowed
	userAgent string
	proxied   bool // the requests go to the TokenProxy

	err    error // of the transport; nil if there was an answer
	token  bool  // the last request was for a token, not for where to get one
	status int
	retry  string // its header Retry-After
	body   []byte
}

// Do implements azcore's policy.Transporter.
func (x *exchange) Do(r *http.Request) (*http.Response, error) {
	x.err, x.status, x.retry, x.body = nil, 0, "", nil
	x.token = r.Method == http.MethodPost
	resp, err := x.do(r)
	if err != nil {
		x.err = err
		return nil, err
	}
	return resp, nil
}

func (x *exchange) do(r *http.Request) (*http.Response, error) {
	// An authority says at which URL its tokens are. That may be another name of
	// its own, and must not be a place that nobody allowed.
	if host := strings.TrimSuffix(strings.ToLower(r.URL.Host), ":443"); r.URL.Scheme != "https" || !x.hosts[host] {
		return nil, &strayError{fmt.Sprintf("%s://%s", r.URL.Scheme, r.URL.Host)}
	}
	r.Header.Set("User-Agent", x.userAgent)
	resp, err := x.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	x.status, x.retry, x.body = resp.StatusCode, resp.Header.Get("Retry-After"), body
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// refusal is the last answer as an error.
func (x *exchange) refusal(now time.Time) *Error {
	e := newError(x.status, x.retry, x.body, now)
	e.Source = sourceEntra
	if x.proxied && e.Code == "" {
		e.explainTokenProxy(x.body)
	}
	return e
}

// strayError is a request to a host that is not allowed.
type strayError struct{ to string }

func (e *strayError) Error() string {
	return fmt.Sprintf("Entra's own configuration leads to %.200s, where nothing is sent: it is neither one of Microsoft's authorities nor named by --entra-authority", e.to)
}

// NonRetriable tells azcore to leave it at that.
func (*strayError) NonRetriable() {}
