package proxy

import (
	"net/netip"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
)

// logLimit keeps pods that send requests in a loop from filling the log, and from hiding each
// other's lines: one line a second and five at once for each address, 20 and 100 for all. It
// stays when connections end, so that a new one does not start anew.
type logLimit struct {
	all  *rate.Limiter
	each *lru.Cache[netip.Addr, *rate.Limiter]
}

func newLogLimit() logLimit {
	each, err := lru.New[netip.Addr, *rate.Limiter](1024) // a node has 250 pods at most
	if err != nil {                                       // only for a size below 1
		panic(err)
	}
	return logLimit{all: rate.NewLimiter(20, 100), each: each}
}

// allow reports whether one more line about an address may be written; the zero one counts
// too.
func (l logLimit) allow(addr netip.Addr) bool {
	limiter, ok := l.each.Get(addr)
	if !ok {
		limiter = rate.NewLimiter(1, 5)
		if first, exists, _ := l.each.PeekOrAdd(addr, limiter); exists {
			limiter = first
		}
	}
	return limiter.Allow() && l.all.Allow()
}
