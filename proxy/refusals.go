package proxy

import (
	"net/netip"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
)

// refusals keeps pods that ask in a loop from filling the log, and from hiding each
// other's lines: of each address a line a second and five at once, of all together 20
// and 100.
type refusals struct {
	all  *rate.Limiter
	each *lru.Cache[netip.Addr, *rate.Limiter]
}

func newRefusals() refusals {
	each, err := lru.New[netip.Addr, *rate.Limiter](1024) // a node has 250 pods at most
	if err != nil {                                       // only for a size below 1
		panic(err)
	}
	return refusals{all: rate.NewLimiter(20, 100), each: each}
}

// allow reports whether one more line may be written of what came from an address; the
// zero one counts too.
func (r refusals) allow(from netip.Addr) bool {
	own, ok := r.each.Get(from)
	if !ok {
		own = rate.NewLimiter(1, 5)
		if first, there, _ := r.each.PeekOrAdd(from, own); there {
			own = first
		}
	}
	return own.Allow() && r.all.Allow()
}
