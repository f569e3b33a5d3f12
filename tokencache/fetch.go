package tokencache

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Fetch asks the upstream for one token. It must honour ctx. Its error may say of
// what class it is, see Class, by a method Class() Class; and, by a method
// Wait() time.Duration, how long the upstream wants to be left alone.
type Fetch func(ctx context.Context, req Request) (*Token, error)

// Request is what a flight wants of the upstream.
type Request struct {
	Key
	// Fresh asks for a token that no cache on the way has had already.
	Fresh bool
	// Turn is called before each request to an upstream whose rate is limited, the
	// repeated ones included; by one goroutine at a time.
	Turn Turn
}

// Turn waits until the upstream may be asked once more, fairly between all callers
// that wait. done is to be called, once, when the answer is in, with how long the
// upstream wants to be left alone by all: zero but for a throttled answer. It
// returns ctx's error.
type Turn func(ctx context.Context) (done func(leaveAlone time.Duration), err error)

// Class says what a failure means for those who ask again.
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

// Failure is what Get returns when no token can be had. It wraps the fetch's
// error, be it of now or remembered.
type Failure struct {
	Class Class
	// RetryAfter is how long the upstream will not be asked for this token again.
	RetryAfter time.Duration
	Err        error
}

func (f *Failure) Error() string {
	return fmt.Sprintf("no token (%s, again in %s): %v", f.Class, f.RetryAfter.Round(time.Second), f.Err)
}

// Unwrap returns the fetch's error.
func (f *Failure) Unwrap() error { return f.Err }

// classOf asks an error what it says of itself.
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
