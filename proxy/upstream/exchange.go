package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

const (
	// tryTimeout is for one request and its whole answer. IMDS needs about 0.1 s
	// for a token, and 1 s or 2 where it has to ask Entra.
	tryTimeout = 5 * time.Second
	// maxAnswer bounds what is read of an answer. Entra's tokens stay under
	// 20 KB even with hundreds of groups.
	maxAnswer = 1 << 20
)

// perTry stands below azcore's retry policy, and so has each try of a fetch:
//
//  1. wait for a slot;
//  2. have tryTimeout for request and answer, see wholeAnswers, and be counted;
//  3. release the slot, and say for how long IMDS wants to be left alone.
//
// azcore's own TryTimeout would count the wait for the slot.
type perTry struct{}

// Do implements azcore's policy.Policy.
func (perTry) Do(req *policy.Request) (*http.Response, error) {
	var f *fetch
	if !req.OperationValue(&f) {
		return nil, &finalError{errors.New("a request for IMDS without a fetch")}
	}
	whole := req.Raw().Context()
	release, err := f.slot(whole)
	if err != nil {
		return nil, &finalError{err}
	}
	var retryAfter time.Duration
	defer func() { release(retryAfter) }()

	ctx, cancel := context.WithTimeout(whole, tryTimeout)
	defer cancel()
	began := time.Now()
	resp, err := req.WithContext(ctx).Next()
	took := time.Since(began)
	f.tries++
	switch {
	case err != nil:
		if whole.Err() == nil {
			f.last = err
		}
		f.counts.record(whole, took, err)
		return nil, err
	case resp.StatusCode == http.StatusOK:
		f.counts.record(whole, took, nil)
	default:
		answer := asError(resp)
		f.last = answer
		f.counts.record(whole, took, answer)
		if answer.Status == http.StatusTooManyRequests {
			retryAfter = answer.Wait()
		}
		pace(resp, answer)
	}
	return resp, nil
}

// pace sets when azcore tries again where IMDS did not say: after 410 not before
// 2 s, and after 5xx not before 1 s, as Microsoft asks ("How to use managed
// identities on an Azure VM to acquire an access token", Error handling).
// Otherwise azcore begins at 200 ms.
func pace(resp *http.Response, answer *Error) {
	pause := time.Second
	switch {
	case answer.RetryAfter > 0, !retriable(answer.Status):
		return
	case answer.Status == http.StatusGone:
		pause = maxRetryDelay
	case answer.Status < 500:
		return
	}
	resp.Header.Set("Retry-After-Ms", strconv.FormatInt(pause.Milliseconds(), 10))
}

// asError reads an answer other than 200, and leaves its body to be read again.
func asError(resp *http.Response) *Error {
	body, _ := io.ReadAll(resp.Body) // from memory, see wholeAnswers
	resp.Body = io.NopCloser(bytes.NewReader(body))
	e := newError(resp.StatusCode, resp.Header.Get("Retry-After"), body, time.Now())
	e.Source = sourceIMDS
	return e
}

// send makes one request.
func send(req *http.Request, transport *http.Transport) (*http.Response, error) {
	// net/http would send a GET again by itself when a connection that it kept is
	// closed, past the limiter. It does not when there may be a body that it cannot
	// have twice, and sends none when it finds that empty.
	req.Body, req.GetBody = io.NopCloser(bytes.NewReader(nil)), nil
	client := &http.Client{
		Transport: transport,
		// A redirect would send the request, and with it the node's
		// standing, to another address. IMDS never redirects.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return client.Do(req)
}

// onNewConnections returns a transport like t that opens a connection for each request,
// and closes it after that. It is for a request that was answered 421: a metadata
// security proxy (Azure's GuestProxyAgent) no longer knows whose the connection is, and
// may know the others that t keeps no better (RFC 9110, section 15.5.20).
func onNewConnections(t *http.Transport) *http.Transport {
	anew := t.Clone()
	anew.DisableKeepAlives = true
	return anew
}

// finalError ends the tries.
type finalError struct{ error }

func (e *finalError) Unwrap() error { return e.error }

// NonRetriable tells azcore to leave it at that.
func (*finalError) NonRetriable() {}

// wholeAnswers is the transport below azcore. It returns once an answer is in, body
// and all, so that an answer that stalls or is cut is one more failed try.
type wholeAnswers struct{ transport *http.Transport }

// Do implements azcore's policy.Transporter.
func (t wholeAnswers) Do(req *http.Request) (*http.Response, error) {
	resp, err := send(req, t.transport)
	if err == nil && resp.StatusCode == http.StatusMisdirectedRequest {
		// Not of IMDS, which has not seen the request, so that it takes no other slot.
		resp.Body.Close()
		resp, err = send(req, onNewConnections(t.transport))
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case resp.StatusCode != http.StatusOK: // the status counts, with or without words
		body = body[:min(len(body), maxAnswer)]
	case err != nil:
		return nil, fmt.Errorf("reading IMDS's answer: %w", err)
	case len(body) > maxAnswer:
		return nil, &finalError{fmt.Errorf("IMDS's answer cannot be used: it is longer than %d bytes", maxAnswer)}
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}
