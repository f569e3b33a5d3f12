//go:build cluster

package e2e

import (
	"context"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// TestBesideKubeProxy runs on one cluster for each mode of kube-proxy.
func TestBesideKubeProxy(t *testing.T) {
	s := begin(t, "Beside kube-proxy pods reach services and get tokens, and both fences are there.", theIMDS, theNode)
	if os.Getenv("KUBE_PROXY") == "nftables" { // "cluster.sh run" sets it
		s.onNode("nft", "list", "table", "ip", "kube-proxy")
	} else {
		s.onNode("iptables", "-w", "-t", "nat", "-S", "KUBE-SERVICES")
	}
	s.bind("cart", cart)
	// The agent's metrics are the server that every cluster has.
	services := world.kube.CoreV1().Services(agentNamespace)
	service, err := services.Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "nmi-e2e-"},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"component": "nmi", "tier": "node"},
			Ports:    []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(9090)}},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() {
		assert.NoError(t, services.Delete(context.Background(), service.Name, metav1.DeleteOptions{}))
	})
	metrics := request{"http://" + service.Spec.ClusterIP + "/metrics", 200, ""}
	retried := asks(metrics) // kube-proxy has heard of it by then
	retried.retry = true
	s.start(pod{name: "first", askers: []asker{retried}})
	s.finish()

	s.start(
		pod{name: "cart", binding: "cart", askers: []asker{asks(metrics, s.token(cart), metrics, s.token(cart))}},
		pod{name: "unbound", askers: []asker{asks(metrics, s.refused(), metrics, s.refused())}},
	)
	s.finish()
	for _, r := range []rules{natRules, guardRules, routingRules} {
		s.onNode("bash", "-c", r.present)
	}
}
