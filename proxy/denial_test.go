package proxy

import (
	"net/netip"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/podresolver"
)

func TestDenials(t *testing.T) {
	var mu sync.Mutex
	var denials []Denial
	w := newWorld(t, func(cfg *Config) {
		cfg.Refused = func(d Denial) {
			mu.Lock()
			defer mu.Unlock()
			denials = append(denials, d)
		}
	})
	for range 7 { // more than the log takes
		w.get(unbound, tokenURL)
	}
	w.get(stranger, tokenURL)
	w.get(bound, tokenURL)
	w.get(bound, "/metadata/nothing") // the client's mistake
	mu.Lock()
	defer mu.Unlock()
	assert.GreaterOrEqual(t, len(denials), 5)
	assert.Less(t, len(denials), 7)
	for _, d := range denials {
		assert.Equal(t, "shop/unbound", d.Pod.String())
		assert.Equal(t, podresolver.NoIdentityBound, d.Reason)
		assert.Contains(t, d.Text, `no AzureIdentityBinding in namespace "shop"`)
		assert.Contains(t, d.Fix, "create an AzureIdentityBinding")
		assert.Equal(t, uint64(1), d.Count)
	}
}

func TestRefusalsSinceTheLastDenial(t *testing.T) {
	m := newRefusals()
	add := func(precise bool) uint64 { return m.add(netip.MustParseAddr(bound), Refusal{cause: "x"}, precise) }
	assert.Equal(t, uint64(1), add(true))
	add(false)
	add(false)
	assert.Equal(t, uint64(3), add(true))
	assert.Equal(t, uint64(1), add(true))
}
