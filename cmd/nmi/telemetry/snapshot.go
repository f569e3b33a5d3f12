package telemetry

import (
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// snapshot is what the parts have counted, and how they are, at one time.
type snapshot struct {
	rules          iptables.Status
	ruleCounts     iptables.Stats
	pods           podresolver.Stats
	tokens         tokencache.Stats
	connections    listener.Stats
	fastPath       uint64
	sourcesRefused uint64
	withheld       bool // tokens are, because of a bridge
	unavailable    bool // IMDS is
	shared         bool // the limits on requests to IMDS are
}

func (p Parts) snapshot() snapshot {
	return snapshot{
		rules:          p.Rules.Status(),
		ruleCounts:     p.Rules.Stats(),
		pods:           p.Pods.Stats(),
		tokens:         p.Tokens.Stats(),
		connections:    p.Server.Connections(),
		fastPath:       p.Server.FastPathRequests(),
		sourcesRefused: p.Links.Stats().Refused,
		withheld:       p.Links.Status().Unguarded != nil,
		unavailable:    p.Upstream.Unavailable() != nil,
		shared:         p.Upstream.Shared(),
	}
}
