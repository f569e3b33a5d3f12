package upstream

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/podidentity/nmi/tokencache/limiter"
)

const (
	// passThroughSlots is how many requests are passed through at once, each on a
	// connection of its own. passThroughTokenSlots is how many more may be for the token
	// path, which only excepted pods may send. IMDS gets no other requests, except for the
	// agent's own for tokens, which have their limiter. It asks for at most 5 requests a
	// second, and answers in milliseconds.
	passThroughSlots      = 32
	passThroughTokenSlots = 8
	// slotTimeout is how long a request waits for its slot.
	slotTimeout = 5 * time.Second
	// passThroughTimeout is for one request and its whole answer. The first request for
	// scheduled events takes up to two minutes (Microsoft, "Scheduled Events for
	// Linux VMs", Enabling and disabling).
	passThroughTimeout = 150 * time.Second
	// maxHeader bounds an answer's header. IMDS sends some 300 bytes.
	maxHeader = 16 << 10
	// maxPassThroughBody bounds an answer's body. The largest is that of
	// /metadata/instance: 87 KB of user data (64 KB in base64), some 80 KB of tags, which
	// come twice, and as much again for disks, keys and addresses where there are many.
	maxPassThroughBody = 1 << 20
)

// ErrBodyTooLong means that IMDS's answer is too long to be passed through.
var ErrBodyTooLong = fmt.Errorf("IMDS's answer is longer than %d bytes", maxPassThroughBody)

var errSwitched = errors.New("IMDS switched to another protocol, which it never does")

// RoundTrip sends a request to IMDS as it is, whatever host it names, and without a
// header that it does not have. It makes Upstream an http.RoundTripper for a reverse
// proxy. The answer's body must be closed.
//
// Bodies are buffered in both directions, so that a slow client holds up no one else:
//
//  1. the request's body is read to its end;
//  2. the request waits for a slot; waiting clients, by RemoteAddr, take turns;
//  3. the request is sent to IMDS, and the answer is read to its end, for 150 s and 1 MiB
//     at most;
//  4. the slot is released.
//
// The memory for the bodies of one address is bounded, see bodyBudget.
func (u *Upstream) RoundTrip(r *http.Request) (*http.Response, error) {
	out := r.WithContext(r.Context()) // a RoundTripper must not change its request
	out.URL = &url.URL{}
	*out.URL = *r.URL
	out.URL.Scheme, out.URL.Host = u.base.Scheme, u.base.Host
	out.Host = u.base.Host
	if _, ok := out.Header["User-Agent"]; !ok { // or net/http sends its own
		out.Header = maps.Clone(out.Header)
		out.Header["User-Agent"] = nil
	}
	from := sourceOf(r)
	if r.Body != nil {
		body, err := u.bodies.read(from, r.Body, r.ContentLength, maxBodies, ErrBodyBudget)
		_ = r.Body.Close() // a RoundTripper must, on errors too
		if err != nil {
			return nil, err
		}
		out.Body = body
	}
	slots, size := u.passThrough, passThroughSlots
	if strings.TrimSuffix(r.URL.Path, "/") == tokenPath { // other spellings only lose these slots
		slots, size = u.passThroughTokens, passThroughTokenSlots
	}
	now := time.Now()
	release, err := slots.Acquire(r.Context(), now, func() ([]netip.Addr, time.Time) {
		return []netip.Addr{from}, now.Add(slotTimeout)
	})
	if errors.Is(err, limiter.ErrTimeout) {
		err = fmt.Errorf("%d requests are being passed through already", size)
	}
	if err != nil {
		if out.Body != nil {
			_ = out.Body.Close()
		}
		return nil, err
	}
	defer release(0)
	ctx, cancel := context.WithTimeout(r.Context(), passThroughTimeout)
	defer cancel()
	return u.exchange(out.WithContext(ctx), from)
}

// exchange sends a request and reads the answer while the slot is held. The answer of a
// metadata security proxy on the way is an *Error, see (*Error).byProxy.
func (u *Upstream) exchange(r *http.Request, from netip.Addr) (*http.Response, error) {
	resp, err := u.transport.RoundTrip(r) // which closes the request's body
	if err == nil && resp.StatusCode == http.StatusMisdirectedRequest && r.Body == nil {
		_ = resp.Body.Close()
		resp, err = onNewConnections(u.transport).RoundTrip(r)
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols { // a tunnel, which nothing bounds
		return nil, errSwitched
	}
	length := resp.ContentLength
	if r.Method == http.MethodHead { // the length of the body that GET would have
		length = 0
	}
	body, err := u.bodies.read(from, resp.Body, length, maxPassThroughBody, ErrBodyTooLong)
	if err != nil {
		return nil, err
	}
	// No answer to HEAD has a body.
	answer := &Error{Source: sourceIMDS, Status: resp.StatusCode, empty: body.empty() && r.Method != http.MethodHead, request: r.Method + " " + r.URL.Path}
	if answer.byProxy() {
		return nil, errors.Join(answer, body.Close())
	}
	resp.Body = body
	return resp, nil
}

// sourceOf returns the address of the client; the zero address is one like others.
func sourceOf(r *http.Request) netip.Addr {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	return from.Addr().Unmap()
}
