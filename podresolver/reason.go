package podresolver

import (
	"errors"
	"fmt"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Reasons why a pod is not served, as logs, events, pages and commands name them. They are in
// the form of the reason of a Kubernetes Event, and stay the same; texts may change.
const (
	NoIdentityBound          = "NoIdentityBound"          // nothing gives the pod an identity
	SelectorCaseDiffers      = "SelectorCaseDiffers"      // what would match has letters of another case
	BindingInOtherNamespace  = "BindingInOtherNamespace"  // the binding that would match is in another namespace
	IdentityMissing          = "IdentityMissing"          // the binding names an AzureIdentity that does not exist
	ServiceAccountUnusable   = "ServiceAccountUnusable"   // the annotations of the pod's service account are malformed or denied
	ServiceAccountUnknown    = "ServiceAccountUnknown"    // the event of the pod's service account is late
	IdentityUnusable         = "IdentityUnusable"         // the AzureIdentity is malformed, denied or limited to another namespace
	RequestedIdentityMissing = "RequestedIdentityMissing" // the pod has identities, but not the one that the request names
	SeveralIdentities        = "SeveralIdentities"        // the pod has several, and the request has to name one
	NotAssigned              = "NotAssigned"              // MIC has not assigned the identity yet
	PodUnknown               = "PodUnknown"               // no pod of this node has the address or the name
	PodUnconfirmed           = "PodUnconfirmed"           // the address may have been given to another pod
	AddressAmbiguous         = "AddressAmbiguous"         // several pods claim the address
	PodDataStale             = "PodDataStale"             // the API server has been silent for too long
	NotSynced                = "NotSynced"                // the agent has not read everything yet
)

// Reasons lists them.
func Reasons() []string {
	return []string{
		NoIdentityBound, SelectorCaseDiffers, BindingInOtherNamespace, IdentityMissing, IdentityUnusable, RequestedIdentityMissing,
		SeveralIdentities, NotAssigned, ServiceAccountUnusable, ServiceAccountUnknown, PodUnknown, PodUnconfirmed, AddressAmbiguous, PodDataStale, NotSynced,
	}
}

// Reason returns the reason of an error of this package; "" for other errors. It is
// NoIdentityBound for what takes a look at all bindings to tell more precisely, see
// Resolver.Hint.
func Reason(err error) string {
	for _, known := range []struct {
		err    error
		reason string
	}{
		{errDeniedToken, IdentityUnusable},
		{ErrNoIdentity, NoIdentityBound},
		{ErrNotAssigned, NotAssigned},
		{ErrServiceAccount, ServiceAccountUnknown},
		{ErrMultipleIdentities, SeveralIdentities},
		{ErrAmbiguousAddress, AddressAmbiguous},
		{ErrUnconfirmed, PodUnconfirmed},
		{ErrUnknownAddress, PodUnknown},
		{ErrUnknownPod, PodUnknown},
		{ErrStale, PodDataStale},
		{ErrNotSynced, NotSynced},
	} {
		if errors.Is(err, known.err) {
			return known.reason
		}
	}
	return ""
}

// cause is why a pod is not served, and what to do.
type cause struct{ reason, fix string }

// causeOf is the cause of an error about the pod's address or of a choice between identities;
// see noIdentityLocked for ErrNoIdentity.
func causeOf(err error) cause {
	c := cause{reason: Reason(err)}
	switch c.reason {
	case IdentityUnusable:
		c.fix = "bind an identity that --deny-identity does not withhold, and give its client ID in the AzureIdentity"
	case NotAssigned:
		c.fix = "see whether MIC runs, and its log: it assigns identities in standard mode"
	case ServiceAccountUnknown:
		c.fix = "see whether the pod's service account still exists: kubectl get serviceaccount"
	case SeveralIdentities:
		c.fix = "name one in the request (client_id), or bind one alone"
	case AddressAmbiguous:
		c.fix = "delete all of these pods but one: none is served before"
	case PodUnconfirmed:
		c.fix = "wait until the API server has the start of the pod's containers; if it lasts, restart the pod"
	case PodUnknown:
		c.fix = "wait until the pod's status has an address that is its own: kubectl get pod -o wide"
		if _, byUID := errors.AsType[unknownUID](err); byUID {
			c.fix = "look for it: kubectl get pods -A -o custom-columns=NAME:.metadata.name,UID:.metadata.uid; a pod that has been deleted by force may still run"
		}
	case PodDataStale:
		c.fix = "see what keeps the node from the API server: /readyz lists the resources"
	case NotSynced:
		c.fix = "if it lasts, do what the error says of the resource that is missing: /readyz lists them"
	}
	return c
}

// noIdentityLocked is the cause of ErrNoIdentity.
func (r *Resolver) noIdentityLocked(p *Pod, near []nearMiss) cause {
	if p.refusal == nil {
		return cause{RequestedIdentityMissing, fmt.Sprintf("request an identity that the pod has, or bind the requested one in namespace %q", p.Namespace)}
	}
	label := p.info.labels[aadpodidentity.BindingLabel]
	if bound := r.candidatesLocked(p.info); len(bound) > 0 {
		b := bound[0].binding
		if bound[0].missing {
			return cause{IdentityMissing, fmt.Sprintf("create AzureIdentity %s/%s, or correct azureIdentity in AzureIdentityBinding %s", b.Namespace, b.identity, b.ObjectName)}
		}
		return cause{IdentityUnusable, fmt.Sprintf("correct AzureIdentity %s/%s, or bind another one", b.Namespace, b.identity)}
	}
	if p.account != "" {
		return cause{ServiceAccountUnusable, correctAnnotations(p)}
	}
	for _, miss := range near {
		if miss.fix != "" {
			return miss.cause
		}
	}
	switch {
	case p.unusable != "":
		return cause{IdentityUnusable, "see why in MIC's log: it makes the AzureAssignedIdentities, from AzureIdentities and AzureIdentityBindings"}
	case label == "":
		fix := fmt.Sprintf("if it needs an identity, label it (in its controller's template) %s=<selector of an AzureIdentityBinding>", aadpodidentity.BindingLabel)
		if r.cfg.Federation.ServiceAccounts && p.info.account != "" {
			fix += fmt.Sprintf(", or annotate ServiceAccount %s/%s with %s", p.Namespace, p.info.account, ClientIDAnnotation)
		}
		return cause{NoIdentityBound, fix}
	default:
		return cause{NoIdentityBound, fmt.Sprintf("create an AzureIdentityBinding with the selector %q in namespace %q, or correct the pod's label", label, p.Namespace)}
	}
}

func correctAnnotations(p *Pod) string {
	return fmt.Sprintf("correct the annotations of ServiceAccount %s/%s", p.Namespace, p.info.account)
}
