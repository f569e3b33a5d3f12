package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
)

// Pages for nmi explain, on the probe socket alone, which is root's: they name identities.
const (
	explainPage = "/explain" // ?pod=<namespace>/<name>: text; 404 if the pod is not on this node
	configPage  = "/config"  // podresolver.Config as JSON
)

// explainer explains decisions by what the agent itself goes by.
type explainer struct {
	resolver *podresolver.Resolver
	config   podresolver.Config
	confirm  func(netip.Addr, *podresolver.Pod) error // nil where the node's links are not known
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
	} else if slices.ContainsFunc(decision.Identities, podresolver.Identity.Managed) {
		decision.Reasons = append(decision.Reasons, "what is bound here counts only if the node has it: where an identity is not assigned to its virtual machine (scale set), IMDS refuses the token, and the agent's log quotes it")
	}
	return decision.String(), nil
}

// handler adds the pages to others.
func (e *explainer) handler(others http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", others)
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
		_ = json.NewEncoder(w).Encode(e.config) // fails when the client has gone
	})
	return mux
}
