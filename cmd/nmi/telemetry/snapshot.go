package telemetry

import (
	"runtime"

	"github.com/podidentity/nmi/cmd/nmi/events"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// snapshot is what the parts have counted, and how they are, at one time.
type snapshot struct {
	ready              bool
	version, goVersion string

	rules          iptables.Status
	ruleCounts     iptables.Stats
	pods           podresolver.Stats
	tokens         tokencache.Stats
	server         proxy.Stats
	upstream       upstream.Stats
	events         events.Stats
	sourcesRefused uint64
	withheld       bool // tokens are, because of a bridge
}

func (p Parts) snapshot() snapshot {
	return snapshot{
		ready:          p.Ready() == nil,
		version:        p.Version,
		goVersion:      runtime.Version(),
		rules:          p.Rules.Status(),
		ruleCounts:     p.Rules.Stats(),
		pods:           p.Pods.Stats(),
		tokens:         p.Tokens.Stats(),
		server:         p.Server.Stats(),
		upstream:       p.Upstream.Stats(),
		events:         p.Events.Stats(),
		sourcesRefused: p.Links.Stats().Refused,
		withheld:       p.Links.Status().Unguarded != nil,
	}
}
