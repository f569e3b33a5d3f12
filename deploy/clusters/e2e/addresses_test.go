//go:build cluster

package e2e

import (
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/clusters/asker/answers"
)

// addresses are the times at which the API server had pods' addresses. The kubelet of a busy
// node may take longer to report them than the agent waits.
type addresses struct {
	mu sync.Mutex
	of map[string]time.Time // by pod
}

// watchAddresses allows the pods of this scenario to be told to come back for as long as nobody
// but the kubelet knows their addresses. Call it before they are started.
func (s *scenario) watchAddresses() {
	s.t.Helper()
	watch, err := world.kube.CoreV1().Pods(s.namespace).Watch(s.t.Context(), metav1.ListOptions{})
	require.NoError(s.t, err)
	s.addresses = &addresses{of: make(map[string]time.Time)}
	go func() {
		for event := range watch.ResultChan() {
			if p, ok := event.Object.(*corev1.Pod); ok && p.Status.PodIP != "" {
				s.addresses.note(p.Name)
			}
		}
	}()
}

func (a *addresses) note(pod string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.of[pod]; !known {
		a.of[pod] = time.Now()
	}
}

// tooEarly reports whether an answer was 503 because the API server did not have the pod's address.
func (a *addresses) tooEarly(pod string, got answers.Answer) bool {
	if a == nil || got.Status != http.StatusServiceUnavailable || !strings.Contains(got.Error, "is not known yet") {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return got.Time.Add(time.Duration(got.Millis * float64(time.Millisecond))).Before(a.of[pod])
}
