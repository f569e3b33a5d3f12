package main

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// health answers the kubelet's probes. Ready means: listening, synced, rules in
// place, not stopping.
type health struct {
	checks []func() error // nil means well; each error says what to do
	note   func() string  // said when all is well
}

var errStopping = errors.New("the agent is stopping")

func (h *health) err() error {
	var all []error
	for _, check := range h.checks {
		all = append(all, check())
	}
	return errors.Join(all...)
}

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
			fmt.Fprintf(w, "not ready:\n- %s\n", strings.ReplaceAll(err.Error(), "\n", "\n- "))
			return
		}
		fmt.Fprintf(w, "ready\n%s\n", h.note())
	})
	return mux
}
