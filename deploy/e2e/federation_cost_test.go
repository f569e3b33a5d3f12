//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/bench/measure"
)

// TestManyServiceAccounts measures what an agent costs more that watches the service accounts of a
// cluster: docs/scaling.md has its figures.
func TestManyServiceAccounts(t *testing.T) {
	const many, namespace = 5000, "accounts"
	s := begin(t)
	f := s.federation()
	f.grant("service-accounts.yaml")
	ctx := t.Context()
	require.NoError(t, world.CreateNamespace(ctx, namespace))
	accounts := world.Kube.CoreV1().ServiceAccounts(namespace)
	var creating errgroup.Group
	creating.SetLimit(20)
	for i := range many {
		creating.Go(func() error {
			account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{
				Name:   fmt.Sprintf("service-%04d-account", i),
				Labels: map[string]string{"app.kubernetes.io/name": "service", "app.kubernetes.io/instance": fmt.Sprint(i), "app.kubernetes.io/managed-by": "Helm"},
			}}
			_, err := accounts.Create(ctx, account, metav1.CreateOptions{})
			return err
		})
	}
	require.NoError(t, creating.Wait())
	t.Cleanup(func() {
		assert.NoError(t, accounts.DeleteCollection(context.Background(), metav1.DeleteOptions{}, metav1.ListOptions{}))
	})
	t.Logf("the list of %d: %d KiB compressed, %d KiB as it is", many, f.listed(true)>>10, f.listed(false)>>10)

	memory := func(flags ...string) (resident int64) {
		a := f.starts(flags...)
		require.NoError(t, a.AwaitReady(ctx))
		m, err := measure.MemoryOf(a.PID())
		require.NoError(t, err)
		used, err := measure.CPUTime(a.PID())
		require.NoError(t, err)
		t.Logf("%v: resident %.1f MiB, at most %.1f MiB, CPU time %s", flags, float64(m.Resident)/(1<<20), float64(m.Peak)/(1<<20), used)
		s.stops(a)
		return m.Resident
	}
	without := memory()
	assert.Less(t, memory(federationFlag)-without, int64(8<<20), "bytes")
}

// listed is the size of a list of the metadata of service accounts, as an agent requests it.
func (f *federation) listed(compressed bool) int64 {
	f.t.Helper()
	client, err := rest.HTTPClientFor(&rest.Config{
		Host: world.Admin().Host, BearerToken: world.Admin().BearerToken, TLSClientConfig: rest.TLSClientConfig{Insecure: true}, DisableCompression: true,
	})
	require.NoError(f.t, err)
	req, err := http.NewRequestWithContext(f.t.Context(), http.MethodGet, world.Admin().Host+"/api/v1/serviceaccounts?resourceVersion=0", nil)
	require.NoError(f.t, err)
	req.Header.Set("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")
	if compressed {
		req.Header.Set("Accept-Encoding", "gzip")
	}
	resp, err := client.Do(req)
	require.NoError(f.t, err)
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	require.NoError(f.t, err)
	require.Equal(f.t, http.StatusOK, resp.StatusCode)
	return n
}
