//go:build e2e

package e2e

import (
	"context"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
)

// TestFederationOnOwnNodeForAPIServer: the volume that the admission plugin ServiceAccount gives to pods,
// and which pods of this control plane do not have, makes the API server's audience one of theirs. The
// agent's own-node right must not be a right to tokens for it.
func TestFederationOnOwnNodeForAPIServer(t *testing.T) {
	s := begin(t)
	f := s.federation()
	f.grant("own-node.yaml")
	own := f.agentIn(testbed.NodeName)
	life := int64(3607)
	pod, err := world.Kube.CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "cart-3"},
		Spec: corev1.PodSpec{
			NodeName: testbed.NodeName, ServiceAccountName: "cart", Containers: []corev1.Container{{Name: "app", Image: "example/app"}},
			Volumes: []corev1.Volume{{Name: "kube-api-access", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
				Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{ExpirationSeconds: &life, Path: "token"}}},
			}}}},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = world.DeletePod(context.Background(), "shop", "cart-3") })
	f.awaitRight(func() error { return f.requests(own, "shop", "cart", "cart-3", tokenAudience) })
	_, err = own.CoreV1().ServiceAccounts("shop").CreateToken(t.Context(), "cart", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: "cart-3", UID: pod.UID}},
	}, metav1.CreateOptions{})
	assert.Error(t, err, "a token with the rights of shop/cart at the API server")
}
