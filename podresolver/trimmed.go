package podresolver

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// The infos are trimmed objects: they have what decisions need and nothing else, because a
// cluster has tens of thousands of objects. An info does not change once it is stored. Decoded
// strings have their own memory, so that an info does not keep the whole object alive.
type (
	podInfo struct {
		cache.ObjectName
		uid     string
		created time.Time
		started time.Time // see Pod.Started
		// until is the end of a terminating pod's grace period, which deletionTimestamp
		// includes; zero for other pods. After it the address may have been given to
		// another pod, although a finalizer keeps this object.
		until       time.Time
		labels      map[string]string // see keptLabels
		labelsCut   bool              // there are more
		account     string            // name of its service account
		addrs       []netip.Addr      // of its status
		noClaim     string            // why the pod does not claim addrs; "" if it does
		mic         bool              // see isMICPod
		hostNetwork bool
		finished    bool
		caller      netip.Addr // stands for nodeUID, see ByUID; zero without Config.ByUID
		// workloadIdentity is the setting that keeps SDKs in the pod from using IMDS; "" for
		// none.
		workloadIdentity string
	}
	identityInfo struct {
		cache.ObjectName
		kind                 aadpodidentity.IdentityType
		clientID, resourceID string     // lower case
		namespaced           bool       // by BehaviorAnnotation
		federated            string     // value of FederatedAnnotation, see isFederated
		unreadable           string     // see aadpodidentity.AzureIdentitySpec
		principal            *Principal // nil for a managed identity, unless it is federated
	}
	bindingInfo struct {
		cache.ObjectName
		identity, selector string
		created            int64 // Unix time
	}
	exceptionInfo struct {
		cache.ObjectName
		labels    map[string]string // see keptLabels
		labelsCut bool              // there are more
	}
	assignmentInfo struct {
		cache.ObjectName
		pod      cache.ObjectName
		binding  bindingInfo // copied by MIC when it created the assignment
		identity identityInfo
		assigned bool // its state is Assigned: the identity is assigned to the node
		pending  bool // its state is Created
	}
)

func (p *podInfo) terminating() bool { return !p.until.IsZero() }

// expired reports whether the grace period of a terminating pod has ended.
func (p *podInfo) expired(now time.Time) bool { return p.terminating() && !p.until.After(now) }

// claims are the addresses that the pod claims.
func (p *podInfo) claims() []netip.Addr {
	if p.noClaim != "" {
		return nil // they belong to the node, or may belong to another pod
	}
	return p.addrs
}

// callable reports whether a request can be the pod's.
func (p *podInfo) callable() bool { return p.caller.IsValid() || len(p.claims()) > 0 }

// podInfoFor returns the trim function for the pods of one node. FromAPIServer selects them
// already; other Sources may not.
func podInfoFor(node, micNamespace string, byUID bool) func(*corev1.Pod) *podInfo {
	return func(pod *corev1.Pod) *podInfo {
		if pod.Spec.NodeName != node && node != everyNode {
			return nil
		}
		info := &podInfo{
			ObjectName: cache.MetaObjectToName(pod), uid: string(pod.UID), created: pod.CreationTimestamp.Time, account: pod.Spec.ServiceAccountName,
			mic: isMICPod(pod, micNamespace), hostNetwork: pod.Spec.HostNetwork, workloadIdentity: WorkloadIdentity(pod),
		}
		if pod.DeletionTimestamp != nil {
			info.until = pod.DeletionTimestamp.Time
		}
		if byUID {
			info.caller = ByUID(nodeUID(pod))
		}
		info.finished = pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
		if info.finished {
			info.labels = bindingLabelOf(pod.Labels) // thousands of finished pods may be left, and nothing is decided for them
		} else {
			info.labels, info.labelsCut = keptLabels(pod.Labels)
		}
		var running, any bool
		info.started, running, any = containerSummary(&pod.Status)
		switch {
		case info.hostNetwork:
			info.noClaim = "it is on the host network"
		case info.finished: // its sandbox is gone
			info.noClaim = "it has finished"
		case pod.DeletionTimestamp != nil && any && !running: // its sandbox is about to go
			info.noClaim = "it is being deleted, and all its containers have terminated"
		}
		add := func(text string) {
			addr, err := netip.ParseAddr(text)
			if err != nil {
				return // not assigned yet
			}
			if addr = addr.Unmap(); !slices.Contains(info.addrs, addr) {
				info.addrs = append(info.addrs, addr)
			}
		}
		add(pod.Status.PodIP)
		for _, ip := range pod.Status.PodIPs {
			add(ip.IP)
		}
		return info
	}
}

// containerSummary returns when a container of the pod last started, even if it has terminated
// since, whether any is running, and whether there are any. Init and ephemeral containers
// count.
func containerSummary(status *corev1.PodStatus) (started time.Time, running, any bool) {
	for _, statuses := range [][]corev1.ContainerStatus{status.InitContainerStatuses, status.ContainerStatuses, status.EphemeralContainerStatuses} {
		for _, c := range statuses {
			any = true
			running = running || c.State.Running != nil
			for _, state := range []corev1.ContainerState{c.State, c.LastTerminationState} {
				if state.Running != nil && state.Running.StartedAt.After(started) {
					started = state.Running.StartedAt.Time
				}
				if state.Terminated != nil && state.Terminated.StartedAt.After(started) {
					started = state.Terminated.StartedAt.Time
				}
			}
		}
	}
	return started, running, any
}

// WorkloadIdentity names the environment variable that the webhook of Azure Workload Identity
// has set in a pod, or the label that asks for it; "" for neither. AZURE_CLIENT_ID alone does
// not count: applications that use IMDS set it, too.
func WorkloadIdentity(pod *corev1.Pod) string {
	const variable, label = "AZURE_FEDERATED_TOKEN_FILE", "azure.workload.identity/use"
	for _, containers := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for _, c := range containers {
			if slices.ContainsFunc(c.Env, func(env corev1.EnvVar) bool { return env.Name == variable }) {
				return "the variable " + variable
			}
		}
	}
	if pod.Labels[label] == "true" {
		return "the label " + label + "=true"
	}
	return ""
}

// isMICPod reports whether a pod belongs to the Deployment of MIC, the controller that creates
// AzureAssignedIdentities: it may use the node's identities, as with the old NMI. The old NMI
// matched every pod in MIC's namespace whose owner's name begins with "mic"; here the owner
// must be a ReplicaSet of the Deployment "mic". Anyone who may create pods in that namespace
// can create such a pod: see Config.MICNamespace.
func isMICPod(pod *corev1.Pod, micNamespace string) bool {
	owner := metav1.GetControllerOf(pod)
	hash := pod.Labels["pod-template-hash"]
	return micNamespace != "" && pod.Namespace == micNamespace && owner != nil && hash != "" &&
		owner.Kind == "ReplicaSet" && owner.APIVersion == "apps/v1" && owner.Name == "mic-"+hash
}

// maxField bounds the strings that are kept of an object, in bytes: their authors choose them, the
// definitions of the custom resources bound none, and texts quote them. Nothing that has a meaning
// is as long: names have 253, selectors 63, resource IDs some 400.
const maxField = 1024

// bounded returns a copy of a string, since a part of one keeps the whole in memory. A string that is
// too long is cut, and matches nothing then.
func bounded(text string) string { return cut(text, maxField) }

// cut is bounded to another number of bytes.
func cut(text string, most int) string {
	if len(text) <= most {
		return strings.Clone(text)
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}

// trimmed is bounded without white space around the string.
func trimmed(text string) string { return bounded(strings.TrimSpace(text)) }

// maxLabels bounds the labels that are kept of an object, in bytes with what a map needs for each
// (labelCost). Kubernetes bounds each label and not their number: a pod may have a megabyte of them.
// Pods have some ten, of 1 KiB.
const (
	maxLabels = 8 << 10
	labelCost = 64
)

// keptLabels returns labels, and of those above maxLabels the binding label alone: fewer labels of a pod,
// or of an exception, match less.
func keptLabels(labels map[string]string) (kept map[string]string, cut bool) {
	size := 0
	for key, value := range labels {
		size += len(key) + len(value) + labelCost
	}
	if size <= maxLabels {
		return labels, false
	}
	return bindingLabelOf(labels), true
}

func bindingLabelOf(labels map[string]string) map[string]string {
	value, ok := labels[aadpodidentity.BindingLabel]
	if !ok {
		return nil
	}
	return map[string]string{aadpodidentity.BindingLabel: bounded(value)}
}

// newIdentityInfo trims an AzureIdentity. White space around values, from YAML block scalars
// or copying, is removed: in a request to IMDS it would be a part of the value.
func newIdentityInfo(in *aadpodidentity.AzureIdentity) *identityInfo {
	return &identityInfo{
		ObjectName: cache.MetaObjectToName(in), kind: in.Spec.Type, unreadable: bounded(in.Spec.Unreadable),
		clientID: strings.ToLower(trimmed(in.Spec.ClientID)), resourceID: strings.ToLower(trimmed(in.Spec.ResourceID)),
		namespaced: strings.EqualFold(in.Annotations[aadpodidentity.BehaviorAnnotation], aadpodidentity.BehaviorNamespaced),
		federated:  trimmed(in.Annotations[aadpodidentity.FederatedAnnotation]),
		principal:  principalOf(in),
	}
}

// principalOf returns the fields for requests to Entra; nil for an identity that IMDS has the
// tokens of.
func principalOf(in *aadpodidentity.AzureIdentity) *Principal {
	if in.Spec.Type == aadpodidentity.UserAssignedMSI && in.Annotations[aadpodidentity.FederatedAnnotation] != "" {
		return &Principal{TenantID: trimmed(in.Spec.TenantID), Authority: authorityOf(in.Spec.ADEndpoint)}
	}
	if in.Spec.Type != aadpodidentity.ServicePrincipal && in.Spec.Type != aadpodidentity.ServicePrincipalCertificate {
		return nil
	}
	p := &Principal{
		TenantID:        trimmed(in.Spec.TenantID),
		Authority:       cmp.Or(authorityOf(in.Spec.ADEndpoint), defaultAuthority),
		SecretNamespace: cmp.Or(trimmed(in.Spec.ClientPassword.Namespace), in.Namespace),
		SecretName:      trimmed(in.Spec.ClientPassword.Name),
		Certificate:     in.Spec.Type == aadpodidentity.ServicePrincipalCertificate,
	}
	for _, tenant := range in.Spec.AuxiliaryTenantIDs {
		if len(p.AuxiliaryTenantIDs) > maxAuxiliaryTenants {
			break // which makes it unusable
		}
		if tenant = trimmed(tenant); tenant != "" && tenant != p.TenantID && !slices.Contains(p.AuxiliaryTenantIDs, tenant) {
			p.AuxiliaryTenantIDs = append(p.AuxiliaryTenantIDs, tenant)
		}
	}
	return p
}

// authorityOf is an adEndpoint without white space and slashes at its end.
func authorityOf(endpoint string) string { return strings.TrimRight(trimmed(endpoint), "/") }

func newBindingInfo(in *aadpodidentity.AzureIdentityBinding) *bindingInfo {
	return &bindingInfo{
		ObjectName: cache.MetaObjectToName(in), identity: bounded(in.Spec.AzureIdentity), selector: bounded(in.Spec.Selector),
		created: in.CreationTimestamp.Unix(),
	}
}

func newExceptionInfo(in *aadpodidentity.AzurePodIdentityException) *exceptionInfo {
	info := &exceptionInfo{ObjectName: cache.MetaObjectToName(in)}
	info.labels, info.labelsCut = keptLabels(in.Spec.PodLabels)
	return info
}

// assignmentInfoFor returns the trim function for the assignments to one node's pods.
func assignmentInfoFor(node string) func(*aadpodidentity.AzureAssignedIdentity) *assignmentInfo {
	return func(in *aadpodidentity.AzureAssignedIdentity) *assignmentInfo {
		if in.Spec.NodeName != node && node != everyNode || in.Spec.AzureIdentityRef == nil {
			return nil
		}
		info := &assignmentInfo{
			ObjectName: cache.MetaObjectToName(in), pod: cache.NewObjectName(bounded(in.Spec.PodNamespace), bounded(in.Spec.Pod)), identity: *newIdentityInfo(in.Spec.AzureIdentityRef),
			// Early versions of MIC wrote no state. The other state is Unassigned, before
			// MIC deletes the object.
			assigned: in.Status.Status == "" || in.Status.Status == aadpodidentity.Assigned,
			pending:  in.Status.Status == aadpodidentity.Created,
		}
		if in.Spec.AzureBindingRef != nil {
			info.binding = *newBindingInfo(in.Spec.AzureBindingRef)
		}
		return info
	}
}
