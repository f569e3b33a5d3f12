package podresolver_test

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/podresolver"
)

// TestAStormOfBindingsIsFewDecisions: however long a decision takes, what comes
// meanwhile is one more.
func TestAStormOfBindingsIsFewDecisions(t *testing.T) {
	const storm = 1000
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, append(cart(), podresolver.NewPod("p", addr.String(), "cart"))...)
		var decisions atomic.Int32
		done := make(chan struct{})
		go func() {
			for {
				_, changed := w.resolver.Addresses()
				select {
				case <-changed:
					decisions.Add(1)
				case <-done:
					return
				}
			}
		}()
		synctest.Wait()

		release := w.resolver.HoldDecisions()
		for i := range storm {
			w.Add(podresolver.NewBinding(fmt.Sprint("b", i), "cart", "cart", 0))
		}
		for w.resolver.Bindings() < storm+1 {
			runtime.Gosched()
		}
		release()
		synctest.Wait()
		close(done)
		assert.LessOrEqual(t, decisions.Load(), int32(3))
		assert.NotZero(t, decisions.Load())

		pod, err := w.resolver.Resolve(t.Context(), addr)
		assert.NoError(t, err)
		id, err := pod.Identity(podresolver.Selector{})
		assert.NoError(t, err)
		assert.Equal(t, "b0", id.Binding, "all have been seen")
	})
}
