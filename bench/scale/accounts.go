package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver"
)

// serviceAccounts measures what --federation=annotated adds: the list and the watch of the metadata of
// the cluster's service accounts. Each row is beside the same without it, on the same cluster.
func (b *bench) serviceAccounts(ctx context.Context, large *filler) error {
	if err := large.addServiceAccounts(ctx, b.accounts); err != nil {
		return err
	}
	root, err := testbed.Root()
	if err != nil {
		return err
	}
	rights, err := testbed.ReadManifests(os.DirFS(filepath.Join(root, "deploy", "federation")), "service-accounts.yaml")
	if err != nil {
		return err
	}
	if err := testbed.Apply(ctx, b.large.Custom, rights); err != nil {
		return err
	}
	topic := fmt.Sprintf("%d service accounts", b.accounts)
	if err := b.starts(ctx, topic+", --federation=off", 1, 40); err != nil {
		return err
	}
	if err := b.starts(ctx, topic+", --federation=annotated", 1.3, 45, "--federation=annotated"); err != nil {
		return err
	}
	if err := b.restart(ctx, topic+", --federation=off", fleetRun{}, "true"); err != nil {
		return err
	}
	return b.restart(ctx, topic+", --federation=annotated", fleetRun{Accounts: true}, "true")
}

// addServiceAccounts creates service accounts as Helm does; every tenth is annotated.
func (f *filler) addServiceAccounts(ctx context.Context, n int) error {
	return many(ctx, n, func(ctx context.Context, i int) error {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{
			Name:        service(i),
			Labels:      map[string]string{"app.kubernetes.io/name": service(i), "app.kubernetes.io/instance": service(i), "app.kubernetes.io/managed-by": "Helm"},
			Annotations: map[string]string{"meta.helm.sh/release-name": service(i), "meta.helm.sh/release-namespace": namespace(i)},
		}}
		if i%10 == 0 {
			account.Annotations[podresolver.ClientIDAnnotation] = f.ids[i%len(f.ids)].ClientID
		}
		_, err := f.kube.CoreV1().ServiceAccounts(namespace(i)).Create(ctx, account, metav1.CreateOptions{})
		return err
	})
}
