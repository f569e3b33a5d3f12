package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

const (
	// maxPassing is how many requests are passed on at once, each on a connection
	// of its own. Together with those for tokens, whose number the limiter bounds,
	// they are all that IMDS gets. It asks for 5 requests a second at most, and
	// answers in milliseconds.
	maxPassing = 32
	// passingPatience is how long a request waits to be one of them.
	passingPatience = 5 * time.Second
	// passTimeout is for one request and its whole answer. The first one for
	// scheduled events takes up to two minutes (Microsoft, "Scheduled Events for
	// Linux VMs", Enabling and disabling).
	passTimeout = 150 * time.Second
	// maxHeader bounds an answer's header. IMDS sends some 300 bytes.
	maxHeader = 16 << 10
	// maxPassed bounds an answer's body. The largest is that of /metadata/instance: 87 KB
	// of user data (64 KB in base64), some 80 KB of tags, which come twice, and
	// as much again for disks, keys and addresses where there are many.
	maxPassed = 4 << 20
)

var (
	errBusy       = fmt.Errorf("%d requests are being passed on already", maxPassing)
	errLongAnswer = fmt.Errorf("IMDS's answer is longer than %d bytes", maxPassed)
	errSwitched   = errors.New("IMDS switched to another protocol, which it never does")
)

// RoundTrip sends a request to IMDS as it is, whatever host it names, and without a
// header that it does not have. It makes Upstream an http.RoundTripper for a reverse
// proxy. Reading the answer's body fails after 4 MiB, rather than end there. The body
// must be closed.
func (u *Upstream) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(r.Context(), passTimeout)
	leave, err := u.enter(ctx)
	if err != nil {
		cancel()
		if r.Body != nil {
			r.Body.Close() // a RoundTripper's duty, even now
		}
		return nil, err
	}
	end := sync.OnceFunc(func() { cancel(); leave() })
	resp, err := u.send(r.Clone(ctx)) // a RoundTripper must not change its request
	if err != nil {
		end()
		return nil, err
	}
	resp.Body = &boundedBody{body: resp.Body, left: maxPassed, end: end}
	return resp, nil
}

// enter waits until one more request may be passed on; leave is to be called when it
// is done.
func (u *Upstream) enter(ctx context.Context) (leave func(), err error) {
	leave = func() { <-u.passing }
	select {
	case u.passing <- struct{}{}:
		return leave, nil
	default:
	}
	patience := time.NewTimer(passingPatience)
	defer patience.Stop()
	select {
	case u.passing <- struct{}{}:
		return leave, nil
	case <-patience.C:
		return nil, errBusy
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (u *Upstream) send(r *http.Request) (*http.Response, error) {
	r.URL.Scheme, r.URL.Host = u.base.Scheme, u.base.Host
	r.Host = u.base.Host
	if _, ok := r.Header["User-Agent"]; !ok {
		r.Header["User-Agent"] = nil // or net/http sends its own
	}
	resp, err := u.transport.RoundTrip(r)
	switch {
	case err != nil:
		return nil, err
	case resp.StatusCode == http.StatusSwitchingProtocols: // a tunnel, on which nothing has a bound
		resp.Body.Close()
		return nil, errSwitched
	case resp.ContentLength > maxPassed:
		resp.Body.Close()
		return nil, errLongAnswer
	}
	return resp, nil
}

// boundedBody is an answer's body of at most left bytes.
type boundedBody struct {
	body io.ReadCloser
	left int64
	end  func() // called by Close
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errLongAnswer
	}
	return n, err
}

func (b *boundedBody) Close() error {
	defer b.end()
	return b.body.Close()
}
