package upstream

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/podidentity/nmi/tokencache"
)

// warningPause is the least time between two warnings of an outage: an IMDS that fails
// now and then must not fill the log.
const warningPause = time.Minute

// outage knows whether IMDS answers, and tells the log when that changes. It learns it
// from the fetches of tokens alone, so that it is as late as they are.
type outage struct {
	log *slog.Logger

	mu       sync.Mutex // guards all below
	answered time.Time  // when IMDS last answered
	began    time.Time  // of the outage; zero if there is none
	failed   int        // fetches since then
	cause    error      // of the last of them
	warned   time.Time  // when an outage was last told to the log
	silent   bool       // this one was not
}

// fetched notes how a fetch ended that began at some time: with an answer of IMDS, be it
// a refusal, or without one.
func (o *outage) fetched(began time.Time, cause error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	if cause == nil {
		o.answered = now
		if !o.began.IsZero() && !o.silent {
			o.log.Info("IMDS gives tokens again", "outage", now.Sub(o.began).Round(time.Second), "failed_fetches", o.failed)
		}
		o.began, o.failed, o.cause = time.Time{}, 0, nil
		return
	}
	if o.began.IsZero() {
		if o.answered.After(began) { // it answers others
			return
		}
		o.began = began
		if o.silent = !o.warned.IsZero() && now.Sub(o.warned) < warningPause; !o.silent {
			o.warned = now
			o.log.Warn("IMDS gives no tokens; those in memory are served meanwhile", "cause", cause, "since", began)
		}
	}
	o.failed++
	o.cause = cause
}

// err says what is known of an outage; nil if there is none.
func (o *outage) err() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.began.IsZero() {
		return nil
	}
	return fmt.Errorf("IMDS has given no tokens since %s (failed fetches: %d): %w",
		o.began.UTC().Format(time.RFC3339), o.failed, o.cause)
}

// unanswered is why a fetch got no answer from IMDS; nil if it got one, be it a refusal.
func unanswered(resp *http.Response, err error, f *fetch) error {
	var answer *Error
	var unusable *finalError
	switch {
	case err == nil && resp.StatusCode == http.StatusOK:
		return nil
	case errors.As(f.last, &answer) && answer.Class() != tokencache.Unavailable, errors.As(f.last, &unusable):
		return nil
	case f.last == nil: // the only try was still waiting when the fetch ended
		return causeOf(err)
	default:
		return causeOf(f.last)
	}
}

// causeOf is what an operator wants to know of a try that failed; not the URL, which is
// one pod's.
func causeOf(err error) error {
	var request *url.Error
	switch {
	case errors.As(err, &request) && request.Timeout():
		return fmt.Errorf("no answer within %s", tryTimeout)
	case errors.As(err, &request):
		return request.Err
	default:
		return err
	}
}
