package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Federation is what the checks need to know of the agent's flags for it.
type Federation struct {
	ServiceAccounts bool // with --federation=annotated
	AsNode          bool // with --federation-as-node
}

// federationRights are those that the agent needs for --federation=annotated besides.
func (d *doctor) federationRights() (all []right) {
	if !d.settings.Federation.ServiceAccounts {
		return nil
	}
	for _, verb := range []string{"list", "watch"} {
		all = append(all, right{resource: "serviceaccounts", verb: verb, apply: "deploy/federation/service-accounts.yaml"})
	}
	return all
}

const federationAdvice = "docs/federation.md#the-right-to-request-tokens"

// maxNamespaces bounds the namespaces that are asked about, of those of the node's pods.
const maxNamespaces = 50

// federation finds out which service accounts' tokens this account may request.
func (c *cluster) federation(ctx context.Context) (found string, err error) {
	if err := c.unreachable(); err != nil {
		return "", err
	}
	cluster, err := c.allowed(ctx, right{resource: "serviceaccounts/token", verb: "create"})
	if err != nil {
		return "", err
	}
	own, err := c.mayAsNode(ctx)
	if err != nil {
		return "", err
	}
	cfg := c.settings.Federation
	switch {
	case cluster:
		return "", warnf("it may request tokens of every service account of the cluster, with all their rights, and so may whoever steals a token of this account: see %s for a narrower right", federationAdvice)
	case own && !cfg.AsNode:
		return "", warnf("it may request those of its own node's pods, and the agent does not: set --federation-as-node")
	case !own && cfg.AsNode:
		return "", warnf("with --federation-as-node it needs deploy/federation/own-node.yaml, and Kubernetes 1.36: see %s", federationAdvice)
	}
	namespaces, err := c.federatedNamespaces(ctx)
	var skip skipped
	switch {
	case own && errors.As(err, &skip):
		return fmt.Sprintf("those of its own node's pods; whether those of some namespaces, too, is not known: %s", err), nil
	case errors.As(err, &skip):
		return "", skipf("whether it may request those of some namespaces is not known: %s", err)
	case err != nil:
		return "", err
	case own && len(namespaces) > 0:
		return "", warnf("besides those of its own node's pods it may request those of all pods of namespaces with pods on this node: %s. Delete the Roles that are left there (deploy/federation/namespace.yaml)", some(namespaces))
	case own:
		return "those of its own node's pods", nil
	case len(namespaces) > 0:
		return "those of namespaces with pods on this node: " + some(namespaces), nil
	case cfg.ServiceAccounts:
		return "", warnf("it may request none of those of this node's pods, and they get no tokens by federation: see %s", federationAdvice)
	}
	switch name, err := c.federatedIdentity(ctx); {
	case apierrors.IsNotFound(err): // no definition: another check says so
	case err != nil:
		return "", skipf("it may request none; whether an AzureIdentity needs them is not known: %s", err)
	case name != "":
		return "", warnf("it may request none of those of this node's pods, and gets no tokens for federated AzureIdentities, such as %s: see %s", name, federationAdvice)
	}
	return "none, which only federation needs", nil
}

// federatedIdentity names an AzureIdentity of the cluster that is federated; "" if none is.
func (c *cluster) federatedIdentity(ctx context.Context) (string, error) {
	query := url.Values{"limit": {"500"}} // each list is in memory, and the agent's limit holds for this process, too
	for {
		var page metav1.PartialObjectMetadataList
		if _, err := c.do(ctx, http.MethodGet, "/apis/"+aadpodidentity.GroupVersion.String()+"/azureidentities?"+query.Encode(), nil, &page); err != nil {
			return "", err
		}
		for _, id := range page.Items {
			if id.Annotations[aadpodidentity.FederatedAnnotation] != "" {
				return id.Namespace + "/" + id.Name, nil
			}
		}
		if page.Continue == "" {
			return "", nil
		}
		query.Set("continue", page.Continue)
	}
}

// mayAsNode reports whether this account may request tokens in the name of its node (KEP-5284).
func (c *cluster) mayAsNode(ctx context.Context) (bool, error) {
	for _, r := range []right{
		{group: "authentication.k8s.io", resource: "nodes", verb: "impersonate:associated-node"},
		{resource: "serviceaccounts/token", verb: "impersonate-on:associated-node:create"},
	} {
		if ok, err := c.allowed(ctx, r); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}

// federatedNamespaces are those of the node's pods in which this account may request tokens.
func (c *cluster) federatedNamespaces(ctx context.Context) (names []string, err error) {
	pods, err := c.listPods(ctx)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, pod := range pods {
		if !slices.Contains(all, pod.Namespace) {
			all = append(all, pod.Namespace)
		}
	}
	slices.Sort(all)
	for _, namespace := range all[:min(len(all), maxNamespaces)] {
		ok, err := c.allowed(ctx, right{resource: "serviceaccounts/token", verb: "create", namespace: namespace})
		if err != nil {
			return nil, err
		}
		if ok {
			names = append(names, namespace)
		}
	}
	return names, nil
}
