package podresolver

import (
	"context"
	"errors"
	"slices"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Inventory is who gets what in a whole cluster, and why not.
type Inventory struct {
	Identities []BoundIdentity // all AzureIdentities, by name
	Pods       []InventoryPod  // that are bound or excepted, by name, finished ones included
}

// BoundIdentity is an AzureIdentity and the bindings that name it.
type BoundIdentity struct {
	Namespace, Name      string
	Type                 aadpodidentity.IdentityType
	ClientID, ResourceID string
	Federated            bool
	Unusable             string   // why no pod gets it, other than for the pod's sake; "" if pods can
	Bindings             []string // names
}

// InventoryPod is a pod and what agents give it.
type InventoryPod struct {
	Namespace, Name string
	ServiceAccount  string
	HostNetwork     bool       // its requests go to IMDS, whatever is bound to it
	Exception       string     // that applies; "" for none
	Identities      []Identity // bound to it, those that MIC has yet to assign included
}

// TakeInventory lists everything once, from Sources of all nodes: see FromAPIServer.
func TakeInventory(ctx context.Context, from Sources, cfg Config) (Inventory, error) {
	cfg.Node = everyNode
	cfg.Federation.ServiceAccounts = false // annotations bind no AzureIdentity
	r, err := New(from, cfg)
	if err != nil {
		return Inventory{}, err
	}
	var missing []error
	for _, w := range r.watchers {
		missing = append(missing, w.listOnce(ctx))
	}
	if err := errors.Join(missing...); err != nil {
		return Inventory{}, err
	}
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	return Inventory{r.boundIdentitiesLocked(), r.inventoryPodsLocked()}, nil
}

func (r *Resolver) boundIdentitiesLocked() (all []BoundIdentity) {
	for name, info := range r.objects.identities {
		id := BoundIdentity{Namespace: name.Namespace, Name: name.Name, Type: info.kind, ClientID: info.clientID, ResourceID: info.resourceID}
		id.Federated, _ = info.isFederated()
		// A pod that nothing is wrong with.
		_, id.Unusable = r.newIdentityLocked(info, &bindingInfo{}, &podInfo{ObjectName: name, account: "default"})
		for _, b := range r.objects.bindingsByIdentity[name] {
			id.Bindings = append(id.Bindings, b.Name)
		}
		slices.Sort(id.Bindings)
		all = append(all, id)
	}
	slices.SortFunc(all, func(a, b BoundIdentity) int {
		return compareNames(cache.NewObjectName(a.Namespace, a.Name), cache.NewObjectName(b.Namespace, b.Name))
	})
	return all
}

func (r *Resolver) inventoryPodsLocked() (all []InventoryPod) {
	for _, info := range r.objects.pods {
		p := InventoryPod{Namespace: info.Namespace, Name: info.Name, ServiceAccount: info.account, HostNetwork: info.hostNetwork}
		p.Exception, _ = r.exceptionLocked(info)
		decided := r.newPod(info)
		r.decideIdentitiesLocked(decided)
		for _, id := range slices.Concat(decided.identities, decided.pending) {
			p.Identities = appendIdentity(p.Identities, id, p.Namespace)
		}
		if p.Exception != "" || len(p.Identities) > 0 {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b InventoryPod) int {
		return compareNames(cache.NewObjectName(a.Namespace, a.Name), cache.NewObjectName(b.Namespace, b.Name))
	})
	return all
}
