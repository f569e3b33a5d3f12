package proxy

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestLogLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newLogLimit()
		lines := func(from string) (n int) {
			for range 1000 {
				if r.allow(netip.MustParseAddr(from)) {
					n++
				}
			}
			return n
		}
		assert.Equal(t, 5, lines("10.0.0.1"))
		assert.Equal(t, 5, lines("10.0.0.2"))
		assert.Equal(t, 5, lines("10.0.0.3"))
		time.Sleep(3 * time.Second)
		assert.Equal(t, 3, lines("10.0.0.1"))
		total := 0
		for i := range 200 {
			total += lines(fmt.Sprintf("10.1.0.%d", i))
		}
		assert.LessOrEqual(t, total, 100)
		assert.LessOrEqual(t, r.each.Len(), 1024)
	})
}
