package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/podidentity/nmi/cmd/nmi/doctor"
	"github.com/podidentity/nmi/cmd/nmi/status"
	"github.com/podidentity/nmi/podresolver"
)

// Pages for nmi explain and nmi doctor, on the probe socket alone, which is root's: they name identities.
const (
	explainPage = "/explain"        // ?pod=<namespace>/<name>&client_id=<ID>: status.Pod as JSON; 404 if the pod is not on this node
	configPage  = doctor.ConfigPage // podresolver.Config and doctor.AgentPage as JSON
)

// explainHandler serves the pages, and next for all other paths. They explain the agent's
// decisions by the agent's own state.
func explainHandler(parts status.Parts, config podresolver.Config, settings doctor.Settings, next http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", next)
	writeJSON := func(w http.ResponseWriter, value any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(value) // fails when the client has gone
	}
	mux.HandleFunc("GET "+explainPage, func(w http.ResponseWriter, r *http.Request) {
		namespace, name, _ := strings.Cut(r.URL.Query().Get("pod"), "/")
		pod, err := parts.Pod(namespace, name, podresolver.Selector{ClientID: r.URL.Query().Get("client_id")})
		switch {
		case errors.Is(err, podresolver.ErrUnknownPod):
			http.Error(w, err.Error(), http.StatusNotFound)
		case err != nil:
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		default:
			writeJSON(w, pod)
		}
	})
	mux.HandleFunc("GET "+configPage, func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, struct {
			podresolver.Config
			doctor.AgentPage
		}{config, doctor.AgentPage{Doctor: settings}})
	})
	return mux
}
