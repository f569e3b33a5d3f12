package upstream

import (
	"maps"
	"slices"

	"github.com/podidentity/nmi/tokencache/limiter"
)

// entraLimiters are the turns at Entra, by the host of the authority. Each host has its own: who may
// write an AzureIdentity chooses among those that are allowed, and one that this node cannot reach
// holds a slot until the fetch times out.
//
// Entra has no limit for a node. These keep the node from flooding it, and the API server with
// requests for Secrets and tokens of service accounts. As many may be in flight as there are in a second: the
// rate holds as long as a fetch takes no longer than that.
type entraLimiters map[string]slotLimiter

// tokenProxyHost is in place of a host for what the TokenProxy exchanges.
const tokenProxyHost = ""

// secretReads is in place of a host for the API server's Secrets. A slot at Entra is not held while
// one is read: decoding its certificate may take seconds.
const secretReads = "/"

func newEntraLimiters(hosts map[string]bool, perSecond int) entraLimiters {
	all := make(entraLimiters)
	for _, host := range slices.AppendSeq([]string{tokenProxyHost, secretReads}, maps.Keys(hosts)) {
		all[host] = limiter.NewFromStart(perSecond, perSecond)
	}
	return all
}

func (e entraLimiters) setLimit(perSecond int) {
	for _, l := range e {
		l.SetLimits(perSecond, perSecond)
	}
}

// stats returns the sums.
func (e entraLimiters) stats() (all limiter.Stats) {
	for _, l := range e {
		s := l.Stats()
		all.Waiting += s.Waiting
		all.InFlight += s.InFlight
	}
	return all
}
