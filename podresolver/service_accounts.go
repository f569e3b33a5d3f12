package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// Annotations of a service account. The first two are Azure Workload Identity's.
const (
	// ClientIDAnnotation is the client ID of the identity that its pods get by default.
	ClientIDAnnotation = "azure.workload.identity/client-id"
	// TenantIDAnnotation is the tenant of its identities; Federation.TenantID without it.
	TenantIDAnnotation = "azure.workload.identity/tenant-id"
	// AdditionalClientIDsAnnotation lists, separated by commas, further identities that its
	// pods get if they name them.
	AdditionalClientIDsAnnotation = "aadpodidentity.k8s.io/additional-client-ids"
)

// serviceAccounts is the resource.
var serviceAccounts = corev1.SchemeGroupVersion.WithResource("serviceaccounts")

// Every node has all service accounts in memory, and authors of annotations write what they like: these
// bound what is kept of one.
const (
	maxAdditional = 20  // identities of AdditionalClientIDsAnnotation
	maxMalformed  = 100 // bytes of what is no client ID, for texts
)

// accountInfo is a trimmed service account. A cluster has thousands, and few are annotated.
type accountInfo struct {
	cache.ObjectName
	uid         string
	annotations *accountAnnotations // nil without ClientIDAnnotation and AdditionalClientIDsAnnotation
}

// accountAnnotations are the annotations, without white space; client IDs are in lower case. What is
// too long to be valid is cut.
type accountAnnotations struct {
	clientID, tenantID string
	additional         []string // GUIDs, maxAdditional at most
	tooMany            bool     // there are more
	malformed          string   // the first of additional client IDs that is no GUID; "" for none
	malformedCount     int
}

// newAccountInfo trims a service account.
func newAccountInfo(in *metav1.PartialObjectMetadata) *accountInfo {
	info := &accountInfo{ObjectName: cache.MetaObjectToName(in), uid: string(in.UID)}
	a := accountAnnotations{clientID: keptClientID(in.Annotations[ClientIDAnnotation]), tenantID: cut(strings.TrimSpace(in.Annotations[TenantIDAnnotation]), maxTenant)}
	for text := range strings.SplitSeq(in.Annotations[AdditionalClientIDsAnnotation], ",") {
		switch id := keptClientID(text); {
		case id == "" || id == a.clientID || slices.Contains(a.additional, id):
		case !isGUID(id):
			a.malformed = cmp.Or(a.malformed, id)
			a.malformedCount++
		case len(a.additional) == maxAdditional:
			a.tooMany = true
		default:
			a.additional = append(a.additional, id)
		}
	}
	if a.clientID != "" || len(a.additional) > 0 || a.malformedCount > 0 {
		info.annotations = &a
	}
	return info
}

// keptClientID returns a client ID in lower case, or the beginning of what is none.
func keptClientID(text string) string {
	text = strings.TrimSpace(text)
	if isGUID(text) {
		return strings.Clone(strings.ToLower(text))
	}
	return cut(text, maxMalformed)
}

func (o *objects) accountChangedLocked(a *accountInfo, _ bool) {
	for name, pod := range o.pods { // of this node: some hundreds at most
		if name.Namespace == a.Namespace && pod.account == a.Name {
			o.dirty[name] = struct{}{}
		}
	}
}

// addAnnotatedLocked adds what the pod's service account gives it, after what is bound to it. One
// that is bound, too, stays the bound one. matched means that a binding matches the pod.
func (r *Resolver) addAnnotatedLocked(p *Pod, matched bool) {
	p.defaults = p.identities
	if !r.cfg.Federation.ServiceAccounts || p.info.account == "" { // as of a static pod's mirror
		return
	}
	if r.objects.accounts[cache.NewObjectName(p.Namespace, p.info.account)] == nil {
		p.late = fmt.Errorf("%w: ServiceAccount %s/%s", ErrServiceAccount, p.Namespace, p.info.account)
		return
	}
	bound := slices.Concat(p.identities, p.pending)
	var own []Identity
	own, p.account = r.annotatedLocked(p.info)
	for _, id := range own {
		if !slices.ContainsFunc(bound, func(b Identity) bool { return b.ClientID == id.ClientID }) {
			p.identities = append(p.identities, id)
		}
	}
	if !matched {
		p.defaults = p.identities
	}
}

// annotationsLocked returns the annotations of a pod's service account; nil if there are none.
func (r *Resolver) annotationsLocked(pod *podInfo) *accountAnnotations {
	if info := r.objects.accounts[cache.NewObjectName(pod.Namespace, pod.account)]; info != nil {
		return info.annotations
	}
	return nil
}

// annotatedLocked returns the identities that a pod's service account gives it, the default first,
// and why others are unusable.
func (r *Resolver) annotatedLocked(pod *podInfo) (own []Identity, unusable string) {
	a := r.annotationsLocked(pod)
	name := cache.NewObjectName(pod.Namespace, pod.account)
	switch {
	case a == nil:
		return nil, ""
	case a.clientID == "":
		return nil, fmt.Sprintf("ServiceAccount %s has the annotation %s and not %s, which is required", name, AdditionalClientIDsAnnotation, ClientIDAnnotation)
	}
	principal, why := r.newFederated(r.accountOfLocked(pod), a.tenantID, "")
	if why != "" {
		return nil, fmt.Sprintf("ServiceAccount %s %s", name, why)
	}
	principal.Annotated = true
	var all []string
	for i, clientID := range append([]string{a.clientID}, a.additional...) {
		why := checkClientID(clientID)
		if why == "" {
			why = r.cfg.Deny.reason(&identityInfo{clientID: clientID})
		}
		if why != "" {
			all = append(all, fmt.Sprintf("ServiceAccount %s %s", name, why))
			if i == 0 { // no other becomes the default
				break
			}
			continue
		}
		own = append(own, Identity{Namespace: name.Namespace, Name: name.Name, ClientID: clientID, Principal: principal})
	}
	if a.malformedCount > 0 && len(own) > 0 {
		text := fmt.Sprintf("ServiceAccount %s %s", name, checkClientID(a.malformed))
		if more := a.malformedCount - 1; more > 0 {
			text += fmt.Sprintf(", and %d more of that kind in %s", more, AdditionalClientIDsAnnotation)
		}
		all = append(all, text)
	}
	if a.tooMany {
		all = append(all, fmt.Sprintf("ServiceAccount %s has more than %d client IDs in %s; the rest is ignored", name, maxAdditional, AdditionalClientIDsAnnotation))
	}
	return own, joinFirst(all)
}

// explainAnnotatedLocked describes what the pod's service account gives it.
func (r *Resolver) explainAnnotatedLocked(p *Pod) (texts []string) {
	name := cache.NewObjectName(p.Namespace, p.info.account)
	own, unusable := r.annotatedLocked(p.info)
	if unusable != "" {
		texts = append(texts, unusable)
	}
	for _, id := range own {
		text := fmt.Sprintf("ServiceAccount %s gives it client ID %s of tenant %s", name, id.ClientID, id.Principal.TenantID)
		if !slices.ContainsFunc(p.identities, func(other Identity) bool { return other.Annotated() && other.ClientID == id.ClientID }) {
			text += ", which is bound to it, too: the binding decides where its tokens come from"
		}
		texts = append(texts, text)
	}
	switch {
	case p.info.account == "":
		texts = append(texts, "it has no service account")
	case r.objects.accounts[name] == nil:
		texts = append(texts, fmt.Sprintf("ServiceAccount %s is not known", name))
	case len(texts) == 0:
		texts = append(texts, fmt.Sprintf("ServiceAccount %s has no annotation %s", name, ClientIDAnnotation))
	case len(p.defaults) < len(p.identities):
		texts = append(texts, "a binding matches the pod, so that a request that names no identity does not get the service account's")
	}
	return texts
}
