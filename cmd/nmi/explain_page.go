package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/podidentity/nmi/cmd/nmi/doctor"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
)

// Pages for nmi explain and nmi doctor, on the probe socket alone, which is root's: they name identities.
const (
	explainPage = "/explain"        // ?pod=<namespace>/<name>: text; 404 if the pod is not on this node
	configPage  = doctor.ConfigPage // podresolver.Config and doctor.AgentPage as JSON
)

// explainer explains the agent's decisions by the agent's own state.
type explainer struct {
	resolver *podresolver.Resolver
	config   podresolver.Config
	settings doctor.Settings
	confirm  func(netip.Addr, *podresolver.Pod) error // nil away from the node, whose interfaces it needs
}

// explain is what nmi explain prints.
func (e *explainer) explain(pod string) (string, error) {
	namespace, name, _ := strings.Cut(pod, "/")
	decision, err := e.resolver.Explain(namespace, name, e.confirm)
	if err != nil {
		return "", err
	}
	if decision.Refusal != nil {
		decision.Answer = proxy.Answer(decision.Refusal)
	} else if slices.ContainsFunc(decision.Identities, func(id podresolver.Identity) bool { return id.Principal == nil }) {
		decision.Reasons = append(decision.Reasons, "what is bound here counts only if the node has it: where an identity is not assigned to its virtual machine (scale set), IMDS refuses the token, and the agent's log quotes it")
	}
	return decision.String(), nil
}

// handler serves the pages, and next for all other paths.
func (e *explainer) handler(next http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", next)
	mux.HandleFunc("GET "+explainPage, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		text, err := e.explain(r.URL.Query().Get("pod"))
		switch {
		case errors.Is(err, podresolver.ErrUnknownPod):
			http.Error(w, err.Error(), http.StatusNotFound)
		case err != nil:
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		default:
			fmt.Fprint(w, text)
		}
	})
	mux.HandleFunc("GET "+configPage, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(struct { // fails when the client has gone
			podresolver.Config
			doctor.AgentPage
		}{e.config, doctor.AgentPage{Doctor: e.settings}})
	})
	return mux
}
