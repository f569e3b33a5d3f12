package podresolver

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// reference implements the rules for a set of objects, simply and slowly.
type reference struct {
	cfg        Config
	pods       []*corev1.Pod
	identities []*aadpodidentity.AzureIdentity
	bindings   []*aadpodidentity.AzureIdentityBinding
	exceptions []*aadpodidentity.AzurePodIdentityException
	assigned   []*aadpodidentity.AzureAssignedIdentity
	accounts   []*metav1.PartialObjectMetadata
}

// owner is "" for an unknown address, "ambiguous", or describes the pod and the result of each
// selector.
func (m *reference) owner(addr netip.Addr, now time.Time, selectors []Selector) string {
	var live, ending []*corev1.Pod
	for _, p := range m.pods {
		switch {
		case p.Spec.NodeName != m.cfg.Node, p.Spec.HostNetwork, !m.holds(p, addr),
			p.Status.Phase == corev1.PodSucceeded, p.Status.Phase == corev1.PodFailed:
		case p.DeletionTimestamp == nil:
			live = append(live, p)
		case p.DeletionTimestamp.After(now) && !m.finished(p):
			ending = append(ending, p)
		}
	}
	youngest := func(p []*corev1.Pod) *corev1.Pod {
		return slices.MaxFunc(p, func(a, b *corev1.Pod) int {
			return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.UID, b.UID))
		})
	}
	var p *corev1.Pod
	switch {
	case len(live)+len(ending) == 0:
		return ""
	case len(live) > 1:
		return "ambiguous"
	case len(live) == 0:
		p = youngest(ending)
	case len(ending) > 0 && youngest(ending).CreationTimestamp.After(live[0].CreationTimestamp.Time):
		return "ambiguous"
	default:
		p = live[0]
	}
	return tell(p.Namespace, p.Name, string(p.UID), m.exception(p), selectors, func(want Selector) string { return m.answer(p, want) })
}

func (m *reference) holds(p *corev1.Pod, addr netip.Addr) bool {
	return p.Status.PodIP == addr.String() ||
		slices.ContainsFunc(p.Status.PodIPs, func(ip corev1.PodIP) bool { return ip.IP == addr.String() })
}

// finished reports whether all containers of a pod have terminated.
func (m *reference) finished(p *corev1.Pod) bool {
	return len(p.Status.ContainerStatuses) > 0 && !slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.State.Running != nil })
}

func tell(namespace, name, uid, exception string, selectors []Selector, answer func(Selector) string) string {
	text := fmt.Sprintf("%s/%s %s", namespace, name, uid)
	if exception != "" {
		return text + " excepted by " + exception
	}
	for _, q := range selectors {
		text += fmt.Sprintf("\n%+v: %s", q, answer(q))
	}
	return text
}

func (m *reference) exception(p *corev1.Pod) string {
	var names []string
	for _, e := range m.exceptions {
		for key, value := range e.Spec.PodLabels {
			counts := m.cfg.ExceptionNamespaces == nil || slices.Contains(m.cfg.ExceptionNamespaces, e.Namespace)
			if has, ok := p.Labels[key]; ok && counts && e.Namespace == p.Namespace && strings.EqualFold(has, value) {
				names = append(names, e.Name)
			}
		}
	}
	if len(names) == 0 {
		return ""
	}
	return slices.Min(names)
}

// offer is an identity with its sort keys.
type offer struct {
	identity                   *aadpodidentity.AzureIdentity
	created                    int64
	binding, space, assignment string
	by                         string // the binding that is reported
	now                        bool   // otherwise pending
}

func (m *reference) answer(p *corev1.Pod, want Selector) string {
	offers := m.offers(p)
	slices.SortFunc(offers, func(a, b offer) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.binding, b.binding), cmp.Compare(a.space, b.space), cmp.Compare(a.assignment, b.assignment))
	})
	fits := func(clientID, resourceID string) bool {
		return want.ObjectID == "" && (want.ClientID == "" || strings.EqualFold(want.ClientID, clientID)) && (want.ResourceID == "" || strings.EqualFold(want.ResourceID, resourceID))
	}
	for _, o := range offers {
		if id := plain(o.identity.Spec); o.now && fits(id.ClientID, id.ResourceID) {
			return told(o.identity.Namespace, o.identity.Name, strings.ToLower(id.ClientID+" "+id.ResourceID), o.by, m.proof(o.identity, p))
		}
	}
	account := m.accountOf(p)
	unnamed := want == Selector{} && (len(offers) > 0 || m.matched(p)) // gets what is bound, or nothing
	for _, clientID := range m.annotated(p) {
		bound := slices.ContainsFunc(offers, func(o offer) bool { return plain(o.identity.Spec).ClientID == clientID })
		if !unnamed && !bound && fits(clientID, "") {
			return told(account.Namespace, account.Name, clientID+" ", "", m.federation(p, account.Annotations[TenantIDAnnotation], ""))
		}
	}
	for _, o := range offers {
		if id := plain(o.identity.Spec); fits(id.ClientID, id.ResourceID) {
			return "wait"
		}
	}
	if m.cfg.Federation.ServiceAccounts && p.Spec.ServiceAccountName != "" && account == nil && !unnamed {
		return "late"
	}
	return "none"
}

// matched reports whether a binding matches a pod, even if it gives it nothing.
func (m *reference) matched(p *corev1.Pod) bool {
	label := p.Labels[aadpodidentity.BindingLabel]
	return label != "" && slices.ContainsFunc(m.bindings, func(b *aadpodidentity.AzureIdentityBinding) bool {
		return b.Spec.Selector == label && (m.cfg.Mode == Standard && !m.cfg.Namespaced || b.Namespace == p.Namespace)
	})
}

// accountOf is a pod's own service account; nil if there is none.
func (m *reference) accountOf(p *corev1.Pod) *metav1.PartialObjectMetadata {
	for _, a := range m.accounts {
		if a.Namespace == p.Namespace && a.Name == p.Spec.ServiceAccountName {
			return a
		}
	}
	return nil
}

// annotated are the client IDs that a pod's service account gives it, the default first.
func (m *reference) annotated(p *corev1.Pod) (clientIDs []string) {
	account := m.accountOf(p)
	if account == nil || !m.cfg.Federation.ServiceAccounts || m.federation(p, account.Annotations[TenantIDAnnotation], "") == "" {
		return nil
	}
	texts := append([]string{account.Annotations[ClientIDAnnotation]}, strings.Split(account.Annotations[AdditionalClientIDsAnnotation], ",")...)
	for i, text := range texts {
		id := strings.ToLower(strings.TrimSpace(text))
		usable := strings.HasPrefix(id, "c") && (id != modelClient0 || len(m.cfg.Deny.ClientIDs) == 0)
		if usable {
			clientIDs = append(clientIDs, id)
		} else if i == 0 {
			return nil // no other becomes the default
		}
	}
	return clientIDs
}

// federation is the proof with a token of the pod's own service account; "" if there is none.
func (m *reference) federation(p *corev1.Pod, tenant, authority string) string {
	tenant = cmp.Or(strings.TrimSpace(tenant), m.cfg.Federation.TenantID)
	if p.Spec.ServiceAccountName == "" || tenant == "" || strings.Contains(tenant, "/") {
		return ""
	}
	account := ServiceAccount{Namespace: p.Namespace, Name: p.Spec.ServiceAccountName}
	if known := m.accountOf(p); known != nil {
		account.UID = string(known.UID)
	}
	authority = cmp.Or(strings.TrimSuffix(authority, "/"), m.cfg.Federation.Authority, "https://login.microsoftonline.com")
	return fmt.Sprintf("%s at %s/%s", account, authority, tenant)
}

// proof is how an AzureIdentity proves itself for a pod.
func (m *reference) proof(id *aadpodidentity.AzureIdentity, p *corev1.Pod) string {
	switch {
	case id.Spec.Type == aadpodidentity.ServicePrincipal:
		secret, authority := id.Spec.ClientPassword, cmp.Or(strings.TrimSuffix(id.Spec.ADEndpoint, "/"), "https://login.microsoftonline.com")
		return fmt.Sprintf("Secret %s/%s at %s/%s", cmp.Or(secret.Namespace, id.Namespace), secret.Name, authority, strings.TrimSpace(id.Spec.TenantID))
	case federatedValue(id) == "true":
		return m.federation(p, id.Spec.TenantID, id.Spec.ADEndpoint)
	default:
		return "IMDS"
	}
}

func federatedValue(id *aadpodidentity.AzureIdentity) string {
	return strings.ToLower(strings.TrimSpace(id.Annotations[aadpodidentity.FederatedAnnotation]))
}

func told(namespace, name, ids, binding, proof string) string {
	return fmt.Sprintf("%s/%s %s by %s with %s", namespace, name, ids, binding, proof)
}

func (m *reference) offers(p *corev1.Pod) []offer {
	standard, label := m.cfg.Mode == Standard, p.Labels[aadpodidentity.BindingLabel]
	var offers []offer
	for _, b := range m.bindings {
		for _, id := range m.identities {
			if label == "" || b.Spec.Selector != label || b.Spec.AzureIdentity != id.Name || b.Namespace != id.Namespace ||
				!standard && b.Namespace != p.Namespace || !m.usable(id, p) {
				continue
			}
			offers = append(offers, offer{id, b.CreationTimestamp.Unix(), b.Name, b.Namespace, "", b.Name, !standard})
		}
	}
	bound := slices.Clone(offers)
	slices.SortFunc(bound, func(a, b offer) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.binding, b.binding))
	})
	for _, a := range m.assigned {
		id, b := a.Spec.AzureIdentityRef, a.Spec.AzureBindingRef
		if !standard || a.Spec.NodeName != m.cfg.Node || a.Spec.PodNamespace != p.Namespace || a.Spec.Pod != p.Name ||
			a.Status.Status == "Unassigned" || b.Spec.Selector != label {
			continue
		}
		if (m.cfg.Namespaced || id.Annotations[aadpodidentity.BehaviorAnnotation] == aadpodidentity.BehaviorNamespaced) && id.Namespace != p.Namespace {
			continue
		}
		if a.Namespace == "default" { // MIC's copy may be older than the annotation
			id = m.current(id)
		}
		if !m.usable(id, p) {
			continue
		}
		by := b.Name
		if a.Namespace != "default" { // not written by MIC
			i := slices.IndexFunc(bound, func(o offer) bool {
				return a.Namespace == p.Namespace && o.identity.Namespace == p.Namespace && id.Namespace == p.Namespace && o.identity.Name == id.Name &&
					plain(o.identity.Spec) == plain(id.Spec)
			})
			if i < 0 {
				continue
			}
			id, by = bound[i].identity, bound[i].by
		}
		offers = append(offers, offer{id, b.CreationTimestamp.Unix(), b.Name, b.Namespace, a.Name, by, a.Status.Status != "Created"})
	}
	return offers
}

// current is the AzureIdentity itself if a copy of it differs in the annotation for federation.
func (m *reference) current(copied *aadpodidentity.AzureIdentity) *aadpodidentity.AzureIdentity {
	for _, id := range m.identities {
		if id.Namespace == copied.Namespace && id.Name == copied.Name && federatedValue(id) != federatedValue(copied) {
			return id
		}
	}
	return copied
}

// plain is the IDs of an AzureIdentity in the form in which they are compared.
func plain(spec aadpodidentity.AzureIdentitySpec) struct{ ClientID, ResourceID string } {
	return struct{ ClientID, ResourceID string }{strings.ToLower(strings.TrimSpace(spec.ClientID)), strings.ToLower(strings.TrimSpace(spec.ResourceID))}
}

func (m *reference) usable(id *aadpodidentity.AzureIdentity, p *corev1.Pod) bool {
	guarded := m.cfg.Namespaced || id.Annotations[aadpodidentity.BehaviorAnnotation] == aadpodidentity.BehaviorNamespaced
	ids := plain(id.Spec)
	federated := federatedValue(id)
	fit := (ids.ClientID != "" || ids.ResourceID != "") && !strings.HasSuffix(ids.ResourceID, "/")
	if id.Spec.Type == aadpodidentity.ServicePrincipal {
		secret := id.Spec.ClientPassword
		borrowed := secret.Namespace != "" && secret.Namespace != id.Namespace
		mayBorrow := m.cfg.Mode == Standard && !guarded
		fit = federated != "true" && ids.ClientID != "" && id.Spec.TenantID != "" && secret.Name != "" && (mayBorrow || !borrowed)
	}
	if id.Spec.Type == aadpodidentity.UserAssignedMSI && federated == "true" {
		fit = fit && ids.ClientID != "" && m.federation(p, id.Spec.TenantID, id.Spec.ADEndpoint) != ""
	}
	return id.Spec.Unreadable == "" && fit && federated != "yes" && !strings.Contains(ids.ClientID, "{") && !m.denied(id) && (!guarded || id.Namespace == p.Namespace)
}

// denied only has to know the IDs of the model.
func (m *reference) denied(id *aadpodidentity.AzureIdentity) bool {
	deny, ids := m.cfg.Deny, plain(id.Spec)
	return len(deny.ClientIDs) > 0 && ids.ClientID == modelClient0 || len(deny.ResourceIDs) > 0 && ids.ResourceID == modelPath0
}

// affects are the pods that a change of one object may affect.
func (m *reference) affects(object any) []cache.ObjectName {
	var all []cache.ObjectName
	labelled := func(namespace, selector string) {
		for _, p := range m.pods {
			if p.Labels[aadpodidentity.BindingLabel] == selector && (p.Namespace == namespace || m.cfg.Mode == Standard && !m.cfg.Namespaced) {
				all = append(all, cache.MetaObjectToName(p))
			}
		}
	}
	switch o := object.(type) {
	case *corev1.Pod:
		all = append(all, cache.MetaObjectToName(o))
	case *aadpodidentity.AzureIdentityBinding:
		labelled(o.Namespace, o.Spec.Selector)
	case *aadpodidentity.AzureIdentity:
		for _, b := range m.bindings {
			if b.Namespace == o.Namespace && b.Spec.AzureIdentity == o.Name {
				labelled(b.Namespace, b.Spec.Selector)
			}
		}
		for _, a := range m.assigned { // which have a copy of it
			if id := a.Spec.AzureIdentityRef; id.Namespace == o.Namespace && id.Name == o.Name {
				all = append(all, cache.NewObjectName(a.Spec.PodNamespace, a.Spec.Pod))
			}
		}
	case *metav1.PartialObjectMetadata:
		for _, p := range m.pods {
			if p.Namespace == o.Namespace && p.Spec.ServiceAccountName == o.Name {
				all = append(all, cache.MetaObjectToName(p))
			}
		}
	case *aadpodidentity.AzurePodIdentityException:
		for _, p := range m.pods {
			if p.Namespace == o.Namespace {
				all = append(all, cache.MetaObjectToName(p))
			}
		}
	case *aadpodidentity.AzureAssignedIdentity:
		all = append(all, cache.NewObjectName(o.Spec.PodNamespace, o.Spec.Pod))
	}
	return all
}

// liveOf are the current objects of a modelStore, in any order.
func liveOf[T any](s *modelStore) []T {
	var all []T
	for o := range maps.Values(s.live) {
		all = append(all, o.(T))
	}
	return all
}
