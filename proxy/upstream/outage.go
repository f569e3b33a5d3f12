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

// warningInterval is the least time between two warnings of outages: an IMDS that fails now
// and then must not fill the log.
const warningInterval = time.Minute

// outage tracks whether IMDS answers, and logs when that changes. It knows only of fetches
// of tokens, and notices a change with the next of them.
type outage struct {
	log *slog.Logger

	mu           sync.Mutex // guards all below
	lastAnswer   time.Time
	began        time.Time // the outage; zero for none
	failed       int       // fetches since it began
	cause        error     // of the last failure
	lastWarning  time.Time // in the log
	warningMuted bool      // this outage is not logged
}

// record records the result of a fetch that began at some time: cause is nil if IMDS
// answered, with a token or a refusal.
func (o *outage) record(began time.Time, cause error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	if cause == nil {
		o.lastAnswer = now
		if !o.began.IsZero() && !o.warningMuted {
			o.log.Info("IMDS gives tokens again", "outage", now.Sub(o.began).Round(time.Second), "failed_fetches", o.failed)
		}
		o.began, o.failed, o.cause = time.Time{}, 0, nil
		return
	}
	if o.began.IsZero() {
		if o.lastAnswer.After(began) { // IMDS answers other fetches
			return
		}
		o.began = began
		if o.warningMuted = !o.lastWarning.IsZero() && now.Sub(o.lastWarning) < warningInterval; !o.warningMuted {
			o.lastWarning = now
			o.log.Warn("IMDS gives no tokens; those in memory are served meanwhile", "cause", cause, "since", began)
		}
	}
	o.failed++
	o.cause = cause
}

// err describes the present outage; nil for none.
func (o *outage) err() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.began.IsZero() {
		return nil
	}
	return fmt.Errorf("IMDS has given no tokens since %s (failed fetches: %d; what to do: docs/troubleshooting.md#when-imds-gives-no-tokens): %w",
		o.began.UTC().Format(time.RFC3339), o.failed, o.cause)
}

// outageCause returns why a fetch got no answer from IMDS; nil if it got a token or a
// refusal.
func outageCause(resp *http.Response, err error, f *fetch) error {
	var answer *Error
	var unusable *finalError
	switch {
	case err == nil && resp.StatusCode == http.StatusOK:
		return nil
	case errors.As(f.last, &answer) && answer.Class() != tokencache.Unavailable, errors.As(f.last, &unusable):
		return nil
	case f.last == nil: // the fetch ended during its only try
		return causeOf(err)
	default:
		return causeOf(f.last)
	}
}

// causeOf returns the part of a failed try's error that concerns operators: not the URL,
// which is one pod's.
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
