package events

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
)

// Refused records that requests of a pod were not served, if there is something to change for
// those who run the pod or its cluster. What passes by itself, or is the same for all pods (such
// as IMDS being down), has metrics and the status page.
func (w *Writer) Refused(d proxy.Denial) {
	switch d.Reason {
	case podresolver.NoIdentityBound, podresolver.SelectorCaseDiffers, podresolver.BindingInOtherNamespace,
		podresolver.IdentityMissing, podresolver.IdentityUnusable, podresolver.RequestedIdentityMissing,
		podresolver.SeveralIdentities, podresolver.NotAssigned, podresolver.AddressAmbiguous, podresolver.ServiceAccountUnusable,
		proxy.IdentityUnknownToIMDS, proxy.IMDSRefused, proxy.EntraRefused, proxy.FederationUnknown, proxy.CredentialUnusable,
		proxy.TokensWithheldOnBridge:
	default:
		return
	}
	w.Record(Event{
		Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: d.Pod.Namespace, Name: d.Pod.Name, UID: types.UID(d.Pod.UID)},
		Reason:    d.Reason, Action: "RequestToken", Note: noteOf(d), Count: d.Count,
	})
}

// noteOf says why, and what to do.
func noteOf(d proxy.Denial) string {
	return withFix(strings.TrimLeft(strings.TrimPrefix(d.Text, "pod "+d.Pod.String()), ":, "), d.Fix)
}

// withFix is a note with what to do, which is never cut.
func withFix(text, fix string) string {
	fix = clean(fix, maxNote/2)
	if fix == "" {
		return clean(text, maxNote)
	}
	fix = ". Fix: " + fix
	return clean(text, maxNote-len(fix)) + fix
}
