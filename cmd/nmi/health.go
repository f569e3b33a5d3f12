package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// health serves /healthz and /readyz.
type health struct {
	checks []func() error  // each error says what to do
	mode   func() string   // of the redirect, and why; shown when no check fails
	notes  func() []string // likewise
}

var errStopping = errors.New("the agent is stopping")

// newHealth says when the agent is ready: not stopping, synced, rules in place, and
// no reason to withhold tokens. An outage of IMDS is a note: tokens in memory are served,
// and no other agent could do better. ctx ends when the agent stops.
func newHealth(ctx context.Context, a *agent) *health {
	return &health{
		checks: []func() error{
			func() error {
				if ctx.Err() != nil {
					return errStopping
				}
				return nil
			},
			a.resolver.Ready,
			func() error { return a.rules.Status().Err },
			func() error { return a.links.Status().Unguarded },
			func() error { return a.rules.Status().Bypass },
		},
		mode: func() string {
			s := a.rules.Status()
			return fmt.Sprintf("redirect mode %s: %s", s.Mode, s.Reason)
		},
		notes: func() []string {
			notes := slices.Concat(a.rules.Status().Notes, a.links.Status().Notes)
			if err := a.resolver.Stale(); err != nil {
				notes = append(notes, "decisions may be out of date:\n"+list(err))
			}
			if err := a.upstream.Unavailable(); err != nil {
				notes = append(notes, err.Error())
			}
			if a.taint != nil {
				notes = append(notes, a.taint.Status())
			}
			if a.guard != nil {
				notes = append(notes, a.guard.Status())
			}
			notes = append(notes, a.handover.Status(), a.probes.status(), a.metrics.status(), a.profiles.status(), a.probeSocket.status())
			return slices.DeleteFunc(notes, func(note string) bool { return note == "" })
		},
	}
}

func (h *health) err() error {
	var all []error
	for _, check := range h.checks {
		all = append(all, check())
	}
	return errors.Join(all...)
}

// list is an error's lines as a list.
func list(err error) string { return "- " + strings.ReplaceAll(err.Error(), "\n", "\n- ") }

func (h *health) handler() http.Handler {
	mux := http.NewServeMux()
	// Alive if it answers at all: a restart mends nothing that is wrong elsewhere. The
	// words are the old NMI's, for tools that read them.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if h.err() == nil {
			fmt.Fprint(w, "Active")
		} else {
			fmt.Fprint(w, "Not Active")
		}
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := h.err(); err != nil {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintf(w, "not ready:\n%s\n", list(err))
			return
		}
		fmt.Fprintf(w, "ready\n%s\n", strings.Join(append([]string{h.mode()}, h.notes()...), "\n"))
	})
	return mux
}
