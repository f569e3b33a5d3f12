package proxy

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/podresolver"
)

// What SDKs do next follows from the status: they give up on 400, and come back on
// 503.
func TestHowErrorsAreTold(t *testing.T) {
	for name, tc := range map[string]struct {
		err        error
		status     int
		retryAfter time.Duration
	}{
		"no identity":            {podresolver.ErrNoIdentity, 400, 0},
		"several, none named":    {podresolver.ErrSeveral, 400, 0},
		"a doubtful address":     {errSource, 400, 0},
		"not assigned yet":       {podresolver.ErrNotAssigned, 503, 5 * time.Second},
		"not known yet":          {podresolver.ErrUnknownAddress, 503, time.Second},
		"claimed twice":          {podresolver.ErrAmbiguousAddress, 503, 5 * time.Second},
		"known for too long":     {podresolver.ErrStale, 503, 10 * time.Second},
		"upstream took too long": {context.DeadlineExceeded, 503, time.Second},
		"anything else":          {errors.New("disk full"), 503, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			got := asHTTP(fmt.Errorf("pod shop/cart-0: %w", tc.err))
			assert.Equal(t, tc.status, got.status)
			assert.Equal(t, tc.retryAfter, got.retryAfter)
			assert.NotContains(t, got.Error(), "cart-0", "pods are told nothing of pods")
		})
	}
}
