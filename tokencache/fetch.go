package tokencache

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// Fetch asks the upstream for one token. It must end some seconds after the upstream was
// first asked, and at once when ctx ends. Its error may say of what class it is, see
// Class, by a method Class() Class; and, by a method Wait() time.Duration, how long the
// upstream wants to be left alone. ErrBusy in it means that the upstream was not asked.
type Fetch func(ctx context.Context, req Request) (*Token, error)

// Request is for one token.
type Request struct {
	Key
	// Fresh asks for a token that no cache on the way has had already.
	Fresh bool
	// Waiting returns the callers that wait for the token, one at least, and until when
	// the request may wait for the upstream's rate limit: 18 s after the last caller
	// joined. Both may be more when it is called again.
	Waiting func() (callers []netip.Addr, until time.Time)
	// Requests returns how many requests wait for the token, 0 for a refresh in the background,
	// and the spans that those are part of which were traced (see trace.SpanContextFromContext),
	// the one that started the fetch first, maxTraced at most.
	Requests func() (waiting int, traced []trace.SpanContext)
}

// Class says what a failure means for clients that ask again.
type Class int

const (
	// Unavailable means that asking again may help. It is the class of errors that
	// do not say theirs.
	Unavailable Class = iota
	// Refused means that asking again changes nothing until somebody changes
	// something in Azure or in the cluster.
	Refused
	// Throttled means that there were too many requests.
	Throttled
)

// String names the class as metrics do.
func (c Class) String() string {
	switch c {
	case Refused:
		return "refused"
	case Throttled:
		return "throttled"
	default:
		return "unavailable"
	}
}

// Failure is what Get returns when it has no token. It wraps the fetch's error, of this
// fetch or from the negative cache.
type Failure struct {
	Class Class
	// RetryAfter is how long the upstream will not be asked for this token again.
	RetryAfter time.Duration
	Err        error
}

// Error leaves out RetryAfter, which is another each time: one cause has one text.
func (f *Failure) Error() string { return fmt.Sprintf("no token (%s): %v", f.Class, f.Err) }

// Unwrap returns the fetch's error.
func (f *Failure) Unwrap() error { return f.Err }

// classOf returns what an error says of itself.
func classOf(err error) (c Class, wait time.Duration) {
	var classed interface{ Class() Class }
	if errors.As(err, &classed) {
		if c = classed.Class(); c != Refused && c != Throttled {
			c = Unavailable
		}
	}
	var patient interface{ Wait() time.Duration }
	if errors.As(err, &patient) {
		wait = patient.Wait()
	}
	return c, wait
}
