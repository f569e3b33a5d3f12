package podresolver_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// notBefore confirms pods of which a container started at that time or later.
func notBefore(start time.Time) func(*podresolver.Pod) error {
	return func(pod *podresolver.Pod) error {
		if pod.Started.Before(start) {
			return fmt.Errorf("%w: %s is too old", podresolver.ErrUnconfirmed, pod)
		}
		return nil
	}
}

func startedAt(pod *corev1.Pod, at time.Time) *corev1.Pod {
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(at)}}}}
	return pod
}

func TestUnconfirmedCallerWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		begin := time.Now()
		w.Add(startedAt(resolvertest.Pod("old", addr.String(), "cart"), begin.Add(-time.Hour)))
		synctest.Wait()
		confirm := notBefore(begin)

		_, err := w.resolver.ResolveCaller(t.Context(), addr, confirm)
		require.ErrorIs(t, err, podresolver.ErrUnconfirmed)
		assert.ErrorContains(t, err, "shop/old is too old")
		assert.Equal(t, podresolver.DefaultPodWait, time.Since(begin))
		assert.Len(t, w.api.pods.lookups(), 1, "the watch may be late")
		assert.Zero(t, w.resolver.Stats().Found)

		go func() {
			time.Sleep(time.Second)
			w.Delete(resolvertest.Pod("old", addr.String(), "cart"))
			synctest.Wait()
			time.Sleep(time.Second)
			w.Add(startedAt(resolvertest.Pod("new", addr.String(), "cart"), time.Now()))
		}()
		begin = time.Now()
		pod, err := w.resolver.ResolveCaller(t.Context(), addr, confirm)
		require.NoError(t, err)
		assert.Equal(t, "new", pod.Name)
		assert.Equal(t, "uid-of-new", pod.UID)
		assert.Equal(t, 2*time.Second, time.Since(begin), "woken by the event, at once")
	})
}

func TestLookupIsConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		begin := time.Now()
		w.Pods.AddDropWatch(startedAt(resolvertest.Pod("late", addr.String(), "cart"), begin.Truncate(time.Second)))
		_, err := w.resolver.ResolveCaller(t.Context(), addr, notBefore(begin.Add(time.Hour)))
		require.ErrorIs(t, err, podresolver.ErrUnconfirmed)
		pod, err := w.resolver.ResolveCaller(t.Context(), addr, notBefore(begin.Truncate(time.Second)))
		require.NoError(t, err)
		assert.Equal(t, "uid-of-late", pod.UID)
	})
}

func TestFinalConfirmErrorDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		w.Add(resolvertest.Pod("cart-0", addr.String(), "cart"))
		synctest.Wait()
		begin := time.Now()
		final := errors.New("final")
		_, err := w.resolver.ResolveCaller(t.Context(), addr, func(*podresolver.Pod) error { return final })
		require.ErrorIs(t, err, final)
		assert.Zero(t, time.Since(begin))

		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err = w.resolver.ResolveCaller(ctx, addr, notBefore(begin.Add(time.Hour)))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Empty(t, w.api.pods.lookups())
	})
}
