package proxy

import (
	"encoding/json"
	"net/http"

	"github.com/podidentity/nmi/proxy/listener"
)

// presence answers /metadata/nmi, which IMDS does not have: whoever debugs in a pod sees whether an
// agent is between the pod and IMDS, which one, and whether it knows the pod. It waits for
// nothing, and tells nothing that is not the pod's to know.
func (s *Server) presence(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkHeaders(r); err != nil {
		return err
	}
	if r.Method != http.MethodGet {
		return errMethod
	}
	_, err := s.resolve(now, callerOf(r), listener.FromContext(r.Context()))
	if err != nil && s.cfg.PodsOnly { // it may be anybody on the network
		return errNotFound
	}
	body, err := json.Marshal(struct {
		Agent    string `json:"agent"`
		Version  string `json:"version"`
		PodKnown bool   `json:"pod_known"`
	}{"nmi", s.cfg.Version, err == nil})
	if err != nil { // strings cannot fail
		panic(err)
	}
	writeJSON(w, http.StatusOK, body)
	return nil
}
