package podresolver

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
)

func TestModel(t *testing.T) {
	sequences, length := 3000, 30
	if testing.Short() {
		sequences = 500
	}
	for seed := range sequences {
		synctest.Test(t, func(t *testing.T) {
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			})
			random := rand.New(rand.NewPCG(uint64(seed), 0))
			m := newMachine(t, random.IntN)
			for range length {
				m.step()
			}
			m.decide()
		})
		if t.Failed() {
			return
		}
	}
}

// FuzzEvents is TestModel with choices from bytes. Its coverage differs from run to run because
// the order of maps does: run it with -fuzzminimizetime 1x, or it keeps minimizing.
func FuzzEvents(f *testing.F) {
	for seed := range 20 {
		random, b := rand.New(rand.NewPCG(uint64(seed), 1)), make([]byte, 300)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		synctest.Test(t, func(t *testing.T) {
			m := newMachine(t, func(n int) int {
				if len(b) == 0 {
					return 0
				}
				choice := int(b[0]) % n
				b = b[1:]
				return choice
			})
			for len(b) > 0 {
				m.step()
			}
			m.decide()
		})
	})
}
