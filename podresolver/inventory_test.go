package podresolver_test

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestInventory(t *testing.T) {
	const client = "ca470000-0000-4000-8000-000000000001"
	on := func(node string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Spec.NodeName = node } }
	cluster := resolvertest.NewCluster(
		resolvertest.Identity("cart", client, ""), resolvertest.Binding("b1", "cart", "cart"), resolvertest.Binding("b2", "other", "cart"),
		resolvertest.Federated(resolvertest.Identity("moved", client, "")), resolvertest.Identity("odd", "odd", ""),
		resolvertest.Pod("a", "10.0.0.1", "cart"),
		resolvertest.With(resolvertest.Pod("b", "10.0.0.2", "cart"), on("another node")),
		resolvertest.With(resolvertest.Pod("c", "", "cart"), func(p *corev1.Pod) { p.Spec.HostNetwork = true }),
		resolvertest.With(resolvertest.Pod("done", "", "cart"), func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }),
		resolvertest.Pod("e", "10.0.0.5", "excepted"), resolvertest.Exception("exception", map[string]string{aadpodidentity.BindingLabel: "excepted"}),
		resolvertest.Pod("unbound", "10.0.0.6", ""),
	)
	t.Cleanup(cluster.Close)
	got, err := podresolver.TakeInventory(t.Context(), cluster.Sources(), podresolver.Config{Federation: podresolver.Federation{TenantID: "t"}})
	require.NoError(t, err)
	require.Len(t, got.Identities, 3)
	assert.Equal(t, podresolver.BoundIdentity{Namespace: "shop", Name: "cart", ClientID: client, Bindings: []string{"b1", "b2"}}, got.Identities[0])
	assert.Equal(t, podresolver.BoundIdentity{Namespace: "shop", Name: "moved", ClientID: client, Federated: true}, got.Identities[1])
	assert.Contains(t, got.Identities[2].Unusable, "is not a GUID")
	type row struct {
		name, account, exception string
		host                     bool
		identities               int
	}
	var rows []row
	for _, p := range got.Pods {
		rows = append(rows, row{p.Name, p.ServiceAccount, p.Exception, p.HostNetwork, len(p.Identities)})
	}
	// A CronJob's pods have finished most of the time, and its next one needs what they needed.
	assert.Equal(t, []row{{"a", "cart", "", false, 1}, {"b", "cart", "", false, 1}, {"c", "cart", "", true, 1}, {"done", "cart", "", false, 1}, {"e", "cart", "exception", false, 0}}, rows)

	sources := podresolver.Sources(cluster.Sources())
	sources.Bindings = &cache.ListWatch{ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) { return nil, errors.New("no") }}
	_, err = podresolver.TakeInventory(t.Context(), sources, podresolver.Config{})
	require.ErrorContains(t, err, "azureidentitybindings")
}
