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
	// passThroughSlots is how many requests are passed on at once, each on a connection of
	// its own, and passThroughTokenSlots how many more of those are for the token path,
	// which only excepted pods' are. Together with the agent's own for tokens, which have
	// their limiter, they are all that IMDS gets. It asks for 5 requests a second at most,
	// and answers in milliseconds.
	passThroughSlots      = 32
	passThroughTokenSlots = 8
	// slotTimeout is how long a request waits for its slot.
	slotTimeout = 5 * time.Second
	// passTimeout is for one request and its whole answer. The first one for
	// scheduled events takes up to two minutes (Microsoft, "Scheduled Events for
	// Linux VMs", Enabling and disabling).
	passTimeout = 150 * time.Second
	// maxHeader bounds an answer's header. IMDS sends some 300 bytes.
	maxHeader = 16 << 10
	// maxPassed bounds an answer's body. The largest is that of /metadata/instance: 87 KB
	// of user data (64 KB in base64), some 80 KB of tags, which come twice, and
	// as much again for disks, keys and addresses where there are many.
	maxPassed = 1 << 20
)

// ErrLongAnswer means that IMDS's answer is longer than may be passed on.
var ErrLongAnswer = fmt.Errorf("IMDS's answer is longer than %d bytes", maxPassed)

var errSwitched = errors.New("IMDS switched to another protocol, which it never does")

// RoundTrip sends a request to IMDS as it is, whatever host it names, and without a
// header that it does not have. It makes Upstream an http.RoundTripper for a reverse
// proxy. The answer's body must be closed.
//
// What IMDS does is on this side of it, and what the client does on the other, so that
// nobody else waits for a client:
//
//  1. the request's body is read to its end;
//  2. it waits for a slot; waiting clients, by RemoteAddr, take turns;
//  3. IMDS is asked, and its answer read to its end, for 150 s and 1 MiB at most;
//  4. the slot is released.
//
// What is in memory for one address is bounded by what is free, see held.
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
		body, err := u.held.read(from, r.Body, r.ContentLength, maxHeld, ErrHeld)
		_ = r.Body.Close() // a RoundTripper's duty, whatever comes of it
		if err != nil {
			return nil, err
		}
		out.Body = body
	}
	slots, size := u.passThrough, passThroughSlots
	if strings.TrimSuffix(r.URL.Path, "/") == tokenPath { // other spellings get no slot of these, and lose nothing else
		slots, size = u.passThroughTokens, passThroughTokenSlots
	}
	now := time.Now()
	release, err := slots.Acquire(r.Context(), now, func() ([]netip.Addr, time.Time) {
		return []netip.Addr{from}, now.Add(slotTimeout)
	})
	if errors.Is(err, limiter.ErrTimeout) {
		err = fmt.Errorf("%d requests are being passed on already", size)
	}
	if err != nil {
		if out.Body != nil {
			_ = out.Body.Close()
		}
		return nil, err
	}
	defer release(0)
	ctx, cancel := context.WithTimeout(r.Context(), passTimeout)
	defer cancel()
	return u.exchange(out.WithContext(ctx), from)
}

// exchange is what takes a slot. An answer of a metadata security proxy on the way is an
// *Error, see (*Error).byProxy.
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
	if resp.StatusCode == http.StatusSwitchingProtocols { // a tunnel, on which nothing has a bound
		return nil, errSwitched
	}
	length := resp.ContentLength
	if r.Method == http.MethodHead { // then it is not that of a body
		length = 0
	}
	body, err := u.held.read(from, resp.Body, length, maxPassed, ErrLongAnswer)
	if err != nil {
		return nil, err
	}
	// Every answer to HEAD has no body.
	answer := &Error{Source: sourceIMDS, Status: resp.StatusCode, empty: body.empty() && r.Method != http.MethodHead, asked: r.Method + " " + r.URL.Path}
	if answer.byProxy() {
		return nil, errors.Join(answer, body.Close())
	}
	resp.Body = body
	return resp, nil
}

// sourceOf is the address of the client; the zero one counts, too.
func sourceOf(r *http.Request) netip.Addr {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	return from.Addr().Unmap()
}
