package proxy

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"unique"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/tokencache"
)

// keyOf is the cache's key for a token of an identity for a resource.
func keyOf(id podresolver.Identity, resource string) tokencache.Key {
	switch {
	case id.Principal != nil:
		return tokencache.Key{ClientID: id.ClientID, Resource: resource, Principal: principalOf(id)}
	case id.ClientID != "": // without the resource ID, so that AzureIdentities with and without it share the token
		return tokencache.Key{ClientID: id.ClientID, Resource: resource}
	default:
		return tokencache.Key{ResourceID: id.ResourceID, Resource: resource}
	}
}

// InUse tells the cache whether the pod that holds an address may have a token now, so
// that it is refreshed without being asked for; see tokencache.Config.
func InUse(pods *podresolver.Resolver) func(netip.Addr, tokencache.Key) bool {
	return func(caller netip.Addr, key tokencache.Key) bool {
		pod := pods.Owner(caller)
		if pod == nil {
			return false
		}
		for identity := range pod.Identities() {
			if keyOf(identity, key.Resource) == key || slices.Contains(auxiliaryKeys(identity, key.Resource), key) {
				return true
			}
		}
		return false
	}
}

// DropUnused drops the tokens of federated identities that no pod of the node has any more, whenever
// that may have changed, until ctx ends: the node's last pod of a service account has gone, the
// service account is another one of the same name, or its annotations have changed.
func DropUnused(ctx context.Context, pods *podresolver.Resolver, tokens *tokencache.Cache) {
	select {
	case <-pods.Synced():
	case <-ctx.Done():
		return
	}
	for {
		_, changed := pods.Addresses()
		dropUnused(pods, tokens)
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func dropUnused(pods *podresolver.Resolver, tokens *tokencache.Cache) {
	inUse := make(map[tokencache.Key]bool)
	for _, id := range pods.FederatedIdentities() {
		inUse[keyOf(id, "")] = true
	}
	tokens.Drop(func(key tokencache.Key) bool {
		p, ok := key.FromEntra()
		key.Resource = ""
		return ok && p.Federated() && !inUse[key]
	})
}

// principals are the Handles of podresolver's Principals, which do not change: to make one takes a
// third of what all else takes for a token in memory. A decision that is made again has another
// Principal, so that some are of no use any more: maxPrincipals bounds them.
var (
	principals     sync.Map // of unique.Handle[tokencache.Principal] by *podresolver.Principal
	principalCount atomic.Int64
)

const maxPrincipals = 2000

// principalOf is principalIn for the identity's own tenant.
func principalOf(id podresolver.Identity) unique.Handle[tokencache.Principal] {
	if known, ok := principals.Load(id.Principal); ok {
		return known.(unique.Handle[tokencache.Principal]) //nolint:errcheck // nothing else is stored there
	}
	handle := principalIn(id, id.Principal.TenantID)
	if principalCount.Add(1) > maxPrincipals {
		principals.Clear()
		principalCount.Store(0)
	}
	principals.Store(id.Principal, handle)
	return handle
}

// principalIn is the part of a key for an identity that Entra knows in one of its tenants.
func principalIn(id podresolver.Identity, tenant string) unique.Handle[tokencache.Principal] {
	return unique.Make(tokencache.Principal{
		TenantID: tenant, Authority: id.Principal.Authority,
		Certificate:     id.Principal.Certificate,
		SecretNamespace: id.Principal.SecretNamespace, SecretName: id.Principal.SecretName,
		ServiceAccount: tokencache.ServiceAccount(id.Principal.ServiceAccount),
	})
}

// auxiliaryKeys are the keys for a service principal's auxiliary tenants, in their order.
// Other identities have none.
func auxiliaryKeys(id podresolver.Identity, resource string) []tokencache.Key {
	if id.Principal == nil || len(id.Principal.AuxiliaryTenantIDs) == 0 {
		return nil
	}
	keys := make([]tokencache.Key, len(id.Principal.AuxiliaryTenantIDs))
	for i, tenant := range id.Principal.AuxiliaryTenantIDs {
		keys[i] = tokencache.Key{ClientID: id.ClientID, Resource: resource, Principal: principalIn(id, tenant)}
	}
	return keys
}
