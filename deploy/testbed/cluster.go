package testbed

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// secondShift moves the ports of a node's second control plane.
const secondShift = 1000

// AddCluster starts a second cluster for the same node, with a control plane of
// its own: a measurement can turn from one to the other. The network and the
// metadata service are w's. Close what it returns before w.
func (w *World) AddCluster(ctx context.Context) (*World, error) {
	second := &World{Network: w.Network, IMDS: w.IMDS}
	if err := second.startCluster(ctx, secondShift); err != nil {
		return nil, errors.Join(err, second.Close())
	}
	return second, nil
}

// allowStandardMode adds what the agent may do in standard mode besides (the chart's
// operationMode) to its ClusterRole: tests run it in both modes.
func allowStandardMode(manifests []*unstructured.Unstructured) {
	for _, object := range manifests {
		if object.GetKind() != "ClusterRole" {
			continue
		}
		rules, _, _ := unstructured.NestedSlice(object.Object, "rules")
		object.Object["rules"] = append(rules, map[string]any{
			"apiGroups": []any{aadpodidentity.GroupVersion.Group},
			"resources": []any{aadpodidentity.AzureAssignedIdentities.Resource},
			"verbs":     []any{"list", "watch"},
		})
	}
}

// startCluster starts the control plane, connects to it, and applies the manifests.
func (w *World) startCluster(ctx context.Context, shift int) error {
	root, err := Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "nmi-testbed-")
	if err != nil {
		return err
	}
	w.onClose(func() error { return os.RemoveAll(dir) })
	if w.ControlPlane, err = startControlPlane(ctx, filepath.Join(root, ".cache", "bin"), dir, shift); err != nil {
		return err
	}
	w.onClose(w.Stop)
	if w.Kube, err = kubernetes.NewForConfig(w.Admin()); err != nil {
		return err
	}
	if w.Custom, err = dynamic.NewForConfig(w.Admin()); err != nil {
		return err
	}
	w.manifests, err = ReadManifests(os.DirFS(filepath.Join(root, "deploy", "manifests")), "crds.yaml", "account.yaml", "exception.yaml", "daemonset.yaml")
	if err != nil {
		return err
	}
	allowStandardMode(w.manifests)
	if err = Apply(ctx, w.Custom, w.manifests); err != nil {
		return err
	}
	w.Kubeconfig, err = w.ControlPlane.Kubeconfig(ctx, "kube-system", "nmi")
	return err
}
