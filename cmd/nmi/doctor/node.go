package doctor

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/podidentity/nmi/iptables"
)

const (
	// hostRouting is AKS's label of nodes with eBPF host routing, where an LSM program refuses
	// rules (azure-block-iptables of Azure/azure-container-networking).
	hostRouting = "kubernetes.azure.com/ebpf-host-routing"
	// userRules is the label that azure-iptables-monitor of the same repository sets on the
	// CiliumNode of a node that has rules of others.
	userRules = "kubernetes.azure.com/user-iptables-rules"
	// startupTaints begins the keys of the taints that docs/startup-taint.md proposes.
	startupTaints = "startup-taint.cluster-autoscaler.kubernetes.io/nmi"
)

func (d *doctor) nodeChecks() []check {
	checks := []check{
		{"ebpf-host-routing", "AKS's eBPF host routing does not bypass iptables", d.hostRouting},
		{"iptables-monitor", "AKS does not flag iptables rules of others on this node", d.iptablesMonitor},
	}
	if !d.cfg.Pre {
		checks = append(checks, check{"startup-taint", "no startup taint keeps pods off the node", d.startupTaint})
	}
	return checks
}

// node reads the node. The manifests give the agent no right to, except with a startup taint,
// and then that to list.
func (c *cluster) node(ctx context.Context) (corev1.Node, error) {
	var node corev1.Node
	if err := c.unreachable(); err != nil {
		return node, err
	}
	name := c.settings.Node
	if name == "" {
		return node, skipf("give --node, the node's name, to look at it")
	}
	_, err := c.do(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(name), nil, &node)
	if apierrors.IsForbidden(err) {
		var list corev1.NodeList
		selector := url.QueryEscape(fields.OneTermEqualSelector(metav1.ObjectNameField, name).String())
		if _, listErr := c.do(ctx, http.MethodGet, "/api/v1/nodes?fieldSelector="+selector, nil, &list); listErr == nil && len(list.Items) == 1 {
			return list.Items[0], nil
		}
		return node, skipf("this account may not get nodes. Look with your own: kubectl get node %s --show-labels", name)
	}
	return node, err
}

func (d *doctor) hostRouting(ctx context.Context) (string, error) {
	node, err := d.cluster.node(ctx)
	switch {
	case err != nil:
		return "", err
	case node.Labels[hostRouting] != "true":
		return "", nil
	case d.settings.Rules.Mode == iptables.None, d.settings.Rules.Mode == iptables.EBPF:
		return fmt.Sprintf("the node has it, and --redirect-mode=%s", d.settings.Rules.Mode), nil
	}
	return "", fmt.Errorf("the node has the label %s=true: it refuses iptables rules, and pods' packets bypass them. Use --redirect-mode=ebpf, or none with a local redirect policy (deploy/cilium)", hostRouting)
}

func (d *doctor) iptablesMonitor(ctx context.Context) (string, error) {
	if err := d.cluster.unreachable(); err != nil {
		return "", err
	}
	if d.settings.Node == "" {
		return "", skipf("give --node, the node's name, to look at it")
	}
	var node metav1.PartialObjectMetadata
	_, err := d.cluster.do(ctx, http.MethodGet, "/apis/cilium.io/v2/ciliumnodes/"+url.PathEscape(d.settings.Node), nil, &node)
	switch {
	case apierrors.IsNotFound(err):
		return "there is no CiliumNode", nil
	case apierrors.IsForbidden(err):
		return "", skipf("this account may not get ciliumnodes. Look with your own: kubectl get ciliumnode %s --show-labels", d.settings.Node)
	case err != nil:
		return "", err
	case node.Labels[userRules] == "true":
		return "", warnf("the CiliumNode has the label %s=true: AKS has found rules that are not on its list, and the agent's are among them. It takes no action now; an upgrade to eBPF host routing will refuse them: plan for --redirect-mode=none", userRules)
	}
	return "", nil
}

func (d *doctor) startupTaint(ctx context.Context) (string, error) {
	node, err := d.cluster.node(ctx)
	if err != nil {
		return "", err
	}
	managed := d.settings.StartupTaint
	for _, taint := range node.Spec.Taints {
		switch {
		case managed.Key != "" && taint.MatchTaint(&managed):
			return "", warnf("%s is still on the node: the agent removes it when it is ready, if it has the rights (see the check of them)", taint.ToString())
		case strings.HasPrefix(taint.Key, startupTaints):
			return "", warnf("%s is on the node, and this agent does not remove it: --startup-taint is %q. Set the flag, or remove the taint: kubectl taint nodes %s %s-", taint.ToString(), managed.ToString(), node.Name, taint.Key)
		}
	}
	return "", nil
}
