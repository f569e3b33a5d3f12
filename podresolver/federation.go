package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Federation is how pods get tokens without any identity on the node: the token of a pod's
// service account is exchanged at Entra (learn.microsoft.com, "Workload identity federation").
//
// There are two ways to give one to a pod. An AzureIdentity with
// aadpodidentity.FederatedAnnotation is bound as any other. With ServiceAccounts, a service account
// with ClientIDAnnotation gives its pods identities, too. What is bound to a pod comes first: if a
// binding matches it, a request that names no identity gets a bound one or none, and never the
// service account's.
type Federation struct {
	ServiceAccounts bool // those that are annotated give identities to their pods
	// TenantID and Authority are for identities that do not name theirs. TenantID is "" if
	// each has to; Authority "" means Entra in the public cloud.
	TenantID, Authority string
}

// ServiceAccount names a service account.
type ServiceAccount struct {
	Namespace, Name string
	UID             string // "" if it is not known, without Federation.ServiceAccounts
}

// Federated reports whether it proves itself with a token of a service account.
func (p *Principal) Federated() bool { return p.ServiceAccount.Name != "" }

// isFederated reports whether an AzureIdentity is federated, or why it is unusable.
func (in *identityInfo) isFederated() (federated bool, unusable string) {
	if in.federated == "" {
		return false, ""
	}
	federated, err := strconv.ParseBool(in.federated)
	switch {
	case err != nil:
		return false, fmt.Sprintf(`has the annotation %s=%q, which is neither "true" nor "false"`, aadpodidentity.FederatedAnnotation, in.federated)
	case federated && in.kind != aadpodidentity.UserAssignedMSI:
		return false, fmt.Sprintf("has the annotation %s, which is for type 0; an application with a federated credential is one, too, with its clientID and tenantID", aadpodidentity.FederatedAnnotation)
	}
	return federated, ""
}

// federatedLocked is how a federated AzureIdentity proves itself for a pod, or why it is unusable.
func (r *Resolver) federatedLocked(in *identityInfo, pod *podInfo) (_ *Principal, unusable string) {
	if in.clientID == "" {
		return nil, "is federated and has no clientID, by which Entra knows it"
	}
	p, unusable := r.newFederated(r.accountOfLocked(pod), in.principal.TenantID, in.principal.Authority)
	return p, cmp.Or(unusable, checkResourceID(in.resourceID))
}

// accountOfLocked is the service account of a pod.
func (r *Resolver) accountOfLocked(pod *podInfo) ServiceAccount {
	account := ServiceAccount{Namespace: pod.Namespace, Name: pod.account}
	if info := r.objects.accounts[cache.NewObjectName(pod.Namespace, pod.account)]; info != nil {
		account.UID = info.uid
	}
	return account
}

// newFederated returns why there is no such Principal as words for the object that asks for it.
func (r *Resolver) newFederated(account ServiceAccount, tenantID, authority string) (_ *Principal, unusable string) {
	cfg := r.cfg.Federation
	p := &Principal{TenantID: cmp.Or(tenantID, cfg.TenantID), Authority: cmp.Or(authority, cfg.Authority, defaultAuthority), ServiceAccount: account}
	switch {
	case account.Name == "":
		unusable = "is federated, and the pod has no service account"
	case p.TenantID == "":
		unusable = "is federated and has no tenant ID: give it one, or all of them by --federation-tenant-id (the chart's federation.tenantID)"
	case !ValidTenant(p.TenantID):
		unusable = fmt.Sprintf("has tenant ID %.100q, which is neither a GUID nor a domain", p.TenantID)
	}
	if unusable != "" {
		return nil, unusable
	}
	return p, ""
}

// maxTenant is the length of the longest domain, in bytes.
const maxTenant = 253

// ValidTenant reports whether a tenant is a GUID or a domain: it becomes a part of a URL's path.
func ValidTenant(tenant string) bool {
	invalid := func(c rune) bool {
		return (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' && c != '.'
	}
	return tenant != "" && len(tenant) <= maxTenant && !strings.ContainsFunc(tenant, invalid) && strings.Trim(tenant, ".") == tenant
}

// BoundPod names a pod that a token of its service account can be bound to.
type BoundPod struct{ Name, UID string }

// PodsOf returns the pods of this node that have a service account and are not at their end, those
// that stay longest first, and then those that a look-up alone has found, of which some may be gone.
func (r *Resolver) PodsOf(account ServiceAccount) []BoundPod {
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	now := time.Now()
	var infos []*podInfo
	for name, info := range r.objects.pods {
		if name.Namespace == account.Namespace && info.account == account.Name && !info.ended(now) {
			infos = append(infos, info)
		}
	}
	slices.SortFunc(infos, func(a, b *podInfo) int {
		if a.terminating() != b.terminating() {
			return map[bool]int{true: 1, false: -1}[a.terminating()]
		}
		return cmp.Or(a.created.Compare(b.created), compareNames(a.ObjectName, b.ObjectName))
	})
	var pods []BoundPod
	for _, info := range infos {
		pods = append(pods, BoundPod{info.Name, info.uid})
	}
	for _, info := range r.objects.lookedUp {
		pod := BoundPod{info.Name, info.uid}
		if info.Namespace == account.Namespace && info.account == account.Name && !info.ended(now) && !slices.Contains(pods, pod) {
			pods = append(pods, pod)
		}
	}
	return pods
}

// ended reports whether the pod has finished, or is about to.
func (p *podInfo) ended(now time.Time) bool {
	return p.expired(now) || p.noClaim != "" && !p.hostNetwork
}

// FederatedIdentities returns the federated identities of all pods of this node that are not at
// their end, those on the host network included, in any order. It decides each of them again, and
// is too slow for requests.
func (r *Resolver) FederatedIdentities() (all []Identity) {
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	now := time.Now()
	for _, info := range r.objects.pods {
		if info.ended(now) {
			continue
		}
		p := r.newPod(info)
		r.decideIdentitiesLocked(p)
		for _, id := range p.identities {
			if id.Principal != nil && id.Principal.Federated() {
				all = append(all, id)
			}
		}
	}
	return all
}
