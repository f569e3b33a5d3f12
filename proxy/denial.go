package proxy

import (
	"fmt"
	"net/netip"

	"github.com/podidentity/nmi/podresolver"
)

// Denial is requests of a pod that were not served, for one reason, in words for those who may
// read the pod's namespace: unlike the log's, they name no pod or binding of another one.
type Denial struct {
	Pod               *podresolver.Pod
	Reason, Text, Fix string
	Count             uint64 // requests for the same cause since the last Denial of them
}

// deny calls Config.Refused for the pod that has the address, or for all that claim it. A caller
// that is no pod of the node is nobody's.
func (s *Server) deny(caller netip.Addr, err error, d Denial) {
	pods := podresolver.Claimants(err)
	d.Text = err.Error()
	for _, pod := range pods {
		if pod.Namespace != pods[0].Namespace {
			d.Text = fmt.Sprintf("%s (%s)", podresolver.ErrAmbiguousAddress, caller)
		}
	}
	if pod := s.cfg.Pods.Owner(caller); pod != nil && len(pods) == 0 {
		pods = []*podresolver.Pod{pod}
	}
	for _, d.Pod = range pods {
		s.cfg.Refused(d)
	}
}
