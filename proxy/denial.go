package proxy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
)

// Denial is requests of a pod that were not served, for one reason, in words for those who may
// read the pod's namespace: unlike the log's, they name no pod or binding of another one.
type Denial struct {
	Pod               *podresolver.Pod
	Reason, Text, Fix string
	Count             uint64 // requests for the same cause since the last Denial of them
}

// passing is what is another for each request: what Entra ends its texts with, and times (AADSTS700024
// has the current one). The log has it.
var passing = regexp.MustCompile(`\s*(Trace ID|Correlation ID|Timestamp): \S+( \d\d:\d\d:\d\dZ)?|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?`)

// steady is a text that is the same for each request of one cause.
func steady(text string) string {
	if !strings.Contains(text, "AADSTS") { // the others have nothing of the kind, and pods can be refused in a loop
		return text
	}
	return passing.ReplaceAllString(text, "")
}

// podError is an error of a request of a pod. By the time that it is reported, the pod's address may
// be another one's.
type podError struct {
	pod *podresolver.Pod
	error
}

// Unwrap returns the error.
func (e *podError) Unwrap() error { return e.error }

// podOf is the pod whose request an error is about: the one that the request was resolved to, or else
// the one that has its address; nil for neither.
func (s *Server) podOf(err error, caller netip.Addr) *podresolver.Pod {
	var of *podError
	if errors.As(err, &of) {
		return of.pod
	}
	return s.cfg.Pods.Owner(caller)
}

// deny calls Config.Refused for the pod that has the address, or for all that claim it. A caller
// that is no pod of the node is nobody's.
func (s *Server) deny(caller netip.Addr, err error, d Denial) {
	pods := podresolver.Claimants(err)
	d.Text = steady(err.Error())
	for _, pod := range pods {
		if pod.Namespace != pods[0].Namespace {
			d.Text = fmt.Sprintf("%s (%s)", podresolver.ErrAmbiguousAddress, caller)
		}
	}
	if pod := s.podOf(err, caller); pod != nil && len(pods) == 0 {
		pods = []*podresolver.Pod{pod}
		// Objects of another namespace, or a Secret and its keys, which the pod's namespace may not read.
		if credential, ok := errors.AsType[*upstream.CredentialError](err); pod.Foreign() || ok && credential.Secret {
			d.Text = asHTTP(err).Error()
			d.Fix = cmp.Or(Fix(d.Reason), "see what nmi explain "+pod.String()+" says in the agent's pod of this node")
		}
	}
	for _, d.Pod = range pods {
		s.cfg.Refused(d)
	}
}
