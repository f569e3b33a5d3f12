package proxy

import (
	"net/netip"
	"slices"
	"unique"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/tokencache"
)

// keyOf is the cache's key for a token of an identity for a resource.
func keyOf(id podresolver.Identity, resource string) tokencache.Key {
	switch {
	case id.Principal != nil:
		return tokencache.Key{ClientID: id.ClientID, Resource: resource, Principal: principalIn(id, id.Principal.TenantID)}
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

// principalIn is the part of a key for a service principal in one of its tenants.
func principalIn(id podresolver.Identity, tenant string) unique.Handle[tokencache.Principal] {
	return unique.Make(tokencache.Principal{
		TenantID: tenant, Authority: id.Principal.Authority,
		Certificate:     id.Principal.Certificate,
		SecretNamespace: id.Principal.SecretNamespace, SecretName: id.Principal.SecretName,
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
