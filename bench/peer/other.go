package peer

import (
	"context"
	"errors"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
)

// OtherAgent returns an agent that takes the flags of aad-pod-identity's NMI and writes
// rules of its own. It may read everything in the cluster.
func (c Config) OtherAgent(ctx context.Context, path string) (Server, error) {
	const namespace, name = "kube-system", "peer"
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
	_, err := c.World.Kube.CoreV1().ServiceAccounts(namespace).Create(ctx, account, metav1.CreateOptions{})
	admin := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: name}},
	}
	_, bindErr := c.World.Kube.RbacV1().ClusterRoleBindings().Create(ctx, admin, metav1.CreateOptions{})
	for _, err := range []error{err, bindErr} {
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return Server{}, err
		}
	}
	kubeconfig, err := c.World.ControlPlane.Kubeconfig(ctx, namespace, name)
	if err != nil {
		return Server{}, err
	}
	return Server{Name: "peer " + filepath.Base(path), Optional: true, start: func(context.Context) (*testbed.Program, error) {
		// Its own rules, and not those of the agent that ran before it.
		if code, output, err := testbed.RunAgent(nil, "cleanup"); err != nil || code != 0 {
			return nil, errors.Join(errors.New("nmi cleanup failed: "+output), err)
		}
		return c.pinned([]string{"KUBECONFIG=" + kubeconfig}, path,
			"--node="+testbed.NodeName, "--operation-mode=managed", "--forceNamespaced", "--http-probe-port=8085",
			"--nmi-listen-address="+testbed.NodeAddress, "--nmi-port=2579")
	}}, nil
}
