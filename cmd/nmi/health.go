package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
)

// health answers the kubelet's probes.
type health struct {
	checks []func() error // nil means well; each error says what to do
	note   func() string  // said when all is well
}

var errStopping = errors.New("the agent is stopping")

// newHealth says when the agent is ready: not stopping, synced, rules in place, and
// no reason to withhold tokens. more is what else there is to say then, each "" or
// lines that begin with a line break. An outage of IMDS is a note: tokens in memory are
// served, and no other agent could do better.
func newHealth(ctx context.Context, resolver *podresolver.Resolver, rules *iptables.Reconciler, source *upstream.Upstream, more ...func() string) *health {
	return &health{
		checks: []func() error{
			func() error {
				if ctx.Err() != nil {
					return errStopping
				}
				return nil
			},
			resolver.Ready,
			func() error { return rules.Status().Err },
			func() error { return rules.Status().Unguarded },
			func() error { return rules.Status().Bypass },
		},
		note: func() string {
			s := rules.Status()
			note := fmt.Sprintf("redirect mode %s: %s", s.Mode, s.Why)
			for _, n := range s.Notes {
				note += "\n" + n
			}
			if err := resolver.Stale(); err != nil {
				note += "\ndecisions may be out of date:\n" + list(err)
			}
			if err := source.Unavailable(); err != nil {
				note += "\n" + err.Error()
			}
			for _, say := range more {
				note += say()
			}
			return note
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

// list is an error as a list, a line for each of its own.
func list(err error) string { return "- " + strings.ReplaceAll(err.Error(), "\n", "\n- ") }

func (h *health) handler() http.Handler {
	mux := http.NewServeMux()
	// Alive as soon as it answers: nothing that is wrong outside gets better by
	// a restart. The words are the old NMI's, for tools that read them.
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
		fmt.Fprintf(w, "ready\n%s\n", h.note())
	})
	return mux
}
