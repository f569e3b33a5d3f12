//go:build cluster

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// cluster is what KUBECONFIG, NMI_CLUSTER and NMI_IMDS lead to.
type cluster struct {
	kube   kubernetes.Interface
	custom dynamic.Interface
	root   string          // the project's folder
	script string          // cluster.sh; "" without one
	imds   *control.Client // nil without one
}

// The identities that the fake metadata service and the fake Entra know.
var (
	cart   = identity("cart", 1)
	report = identity("report", 2)
	// principal proves itself with principalSecret.
	principal = entratest.Principal{
		ClientID: "5e271c00-0000-4000-8000-000000000001", Tenants: []string{"7e9a9700-0000-4000-8000-000000000001"},
		Secret: "the-secret~of.the-principal",
	}
	principalResource = "https://vault.azure.net"
)

func identity(name string, number int) imdstest.Identity {
	return imdstest.Identity{
		ClientID:   fmt.Sprintf("5c0ca47e-1d00-4000-8000-%012d", number),
		ObjectID:   fmt.Sprintf("0b9ec7ed-1d00-4000-8000-%012d", number),
		ResourceID: "/subscriptions/s/resourcegroups/rg/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + name,
	}
}

func connect(ctx context.Context) (*cluster, error) {
	c := &cluster{script: os.Getenv("NMI_CLUSTER")}
	var err error
	if c.root, err = testbed.Root(); err != nil {
		return nil, err
	}
	path := os.Getenv("KUBECONFIG")
	if path == "" {
		return nil, errors.New("KUBECONFIG is not set; start this with cluster.sh run, see doc.go")
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 200, 400 // scenarios poll
	if c.kube, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	if c.custom, err = dynamic.NewForConfig(config); err != nil {
		return nil, err
	}
	if socket := os.Getenv("NMI_IMDS"); socket != "" {
		c.imds = control.NewClient(socket)
		return c, c.configureIMDS(ctx)
	}
	return c, nil
}

// configureIMDS has the fakes answer as Azure does, with its limits for one virtual
// machine.
func (c *cluster) configureIMDS(ctx context.Context) error {
	return c.imds.Configure(ctx, control.Config{
		IMDS:  imdstest.Config{Identities: []imdstest.Identity{cart, report}, Latency: 20 * time.Millisecond, Cached: true, PerSecond: 20, AtOnce: 5},
		Entra: entratest.Config{Principals: []entratest.Principal{principal}, Resources: []string{principalResource}},
	})
}

// command runs a program here, and returns its stdout. Where it fails, text and error
// include stderr too. Warnings are not part of the text: iptables has some.
func (c *cluster) command(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = c.root
	var out, warnings bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &warnings
	if err := cmd.Run(); err != nil {
		text := out.String() + warnings.String()
		return text, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text)
	}
	return out.String(), nil
}
