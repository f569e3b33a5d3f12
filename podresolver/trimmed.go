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

// The rows hold what a decision needs of an object, and no more: a cluster has tens
// of thousands of them. They never change once they are in a table.
type (
	podRow struct {
		cache.ObjectName
		uid     string
		created time.Time
		started time.Time // see Pod.Started
		// until is the end of a terminating pod's grace period, which deletionTimestamp
		// includes; zero for other pods. After it the address may have been given to
		// another pod, although a finalizer keeps this object.
		until       time.Time
		labels      map[string]string
		addrs       []netip.Addr // of its status
		void        string       // why it holds none of addrs; "" if it holds them
		mic         bool         // it is MIC's own, see micPod
		hostNetwork bool
		// workloadIdentity is why its SDKs do not ask IMDS; "" if they do.
		workloadIdentity string
	}
	identityRow struct {
		cache.ObjectName
		kind                 aadpodidentity.IdentityType
		clientID, resourceID string     // lower case
		namespaced           bool       // by its annotation
		unreadable           string     // see aadpodidentity
		principal            *Principal // nil for a managed identity
	}
	bindingRow struct {
		cache.ObjectName
		identity, selector string
		created            int64 // Unix time
	}
	exceptionRow struct {
		cache.ObjectName
		labels map[string]string
	}
	assignedRow struct {
		cache.ObjectName
		pod      cache.ObjectName
		binding  bindingRow // as it was when MIC made the assignment
		identity identityRow
		ready    bool // its state says that the identity is on the node
		coming   bool // its state says that it will be
	}
)

func (p *podRow) terminating() bool { return !p.until.IsZero() }

// expired reports whether the grace period of a terminating pod has ended.
func (p *podRow) expired(now time.Time) bool { return p.terminating() && !p.until.After(now) }

// claimed are the addresses that the pod claims to hold.
func (p *podRow) claimed() []netip.Addr {
	if p.void != "" {
		return nil // they are another pod's or the node's
	}
	return p.addrs
}

// podRowFor returns the parser for the pods of one node. The API server filters by
// node already; this is for one that does not.
func podRowFor(node, micNamespace string) func(*corev1.Pod) *podRow {
	return func(pod *corev1.Pod) *podRow {
		if pod.Spec.NodeName != node {
			return nil
		}
		row := &podRow{
			ObjectName: cache.MetaObjectToName(pod), uid: string(pod.UID), created: pod.CreationTimestamp.Time, labels: pod.Labels,
			mic: micPod(pod, micNamespace), hostNetwork: pod.Spec.HostNetwork, workloadIdentity: workloadIdentity(pod),
		}
		if pod.DeletionTimestamp != nil {
			row.until = pod.DeletionTimestamp.Time
		}
		var running, any bool
		row.started, running, any = containersOf(&pod.Status)
		switch {
		case row.hostNetwork:
			row.void = "it is on the host network"
		case pod.Status.Phase == corev1.PodSucceeded, pod.Status.Phase == corev1.PodFailed: // its sandbox is gone
			row.void = "it has ended"
		case pod.DeletionTimestamp != nil && any && !running: // its sandbox is about to go
			row.void = "it is being deleted, and all its containers have ended"
		}
		add := func(text string) {
			addr, err := netip.ParseAddr(text)
			if err != nil {
				return // not assigned yet
			}
			if addr = addr.Unmap(); !slices.Contains(row.addrs, addr) {
				row.addrs = append(row.addrs, addr)
			}
		}
		add(pod.Status.PodIP)
		for _, ip := range pod.Status.PodIPs {
			add(ip.IP)
		}
		return row
	}
}

// containersOf says when the latest of a pod's containers started, of whatever sort and
// although it may have ended since, whether one is running, and whether there are any.
func containersOf(status *corev1.PodStatus) (started time.Time, running, any bool) {
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

// workloadIdentity names what azure-workload-identity's webhook has set in a pod, or is asked
// to set; "" for neither. AZURE_CLIENT_ID alone says nothing: pods of this agent's have it
// too.
func workloadIdentity(pod *corev1.Pod) string {
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

// micPod reports whether a pod looks like one of MIC's, the controller that makes
// AzureAssignedIdentities: it gets what IMDS gives the node, as in the old NMI. That
// took every pod of MIC's namespace whose owner's name begins with "mic"; here the
// owner must be a ReplicaSet as the Deployment "mic" makes it. Whoever may create pods
// in that namespace can make one that looks like this: see Config.MICNamespace.
func micPod(pod *corev1.Pod, micNamespace string) bool {
	owner := metav1.GetControllerOf(pod)
	hash := pod.Labels["pod-template-hash"]
	return micNamespace != "" && pod.Namespace == micNamespace && owner != nil && hash != "" &&
		owner.Kind == "ReplicaSet" && owner.APIVersion == "apps/v1" && owner.Name == "mic-"+hash
}

// trim removes what YAML's block scalars and copying bring: in a request to IMDS white space
// would be a part of the value.
var trim = strings.TrimSpace

func identityRowOf(in *aadpodidentity.AzureIdentity) *identityRow {
	return &identityRow{
		ObjectName: cache.MetaObjectToName(in), kind: in.Spec.Type, unreadable: in.Spec.Unreadable,
		clientID: strings.ToLower(trim(in.Spec.ClientID)), resourceID: strings.ToLower(trim(in.Spec.ResourceID)),
		namespaced: strings.EqualFold(in.Annotations[aadpodidentity.BehaviorAnnotation], aadpodidentity.BehaviorNamespaced),
		principal:  principalOf(in),
	}
}

// principalOf reads what only service principals have, and returns nil for others.
func principalOf(in *aadpodidentity.AzureIdentity) *Principal {
	if in.Spec.Type != aadpodidentity.ServicePrincipal && in.Spec.Type != aadpodidentity.ServicePrincipalCertificate {
		return nil
	}
	p := &Principal{
		TenantID:        trim(in.Spec.TenantID),
		Authority:       strings.TrimRight(cmp.Or(trim(in.Spec.ADEndpoint), defaultAuthority), "/"),
		SecretNamespace: cmp.Or(trim(in.Spec.ClientPassword.Namespace), in.Namespace),
		SecretName:      trim(in.Spec.ClientPassword.Name),
		Certificate:     in.Spec.Type == aadpodidentity.ServicePrincipalCertificate,
	}
	for _, tenant := range in.Spec.AuxiliaryTenantIDs {
		if tenant = trim(tenant); tenant != "" && tenant != p.TenantID && !slices.Contains(p.AuxiliaryTenantIDs, tenant) {
			p.AuxiliaryTenantIDs = append(p.AuxiliaryTenantIDs, tenant)
		}
	}
	return p
}

func bindingRowOf(in *aadpodidentity.AzureIdentityBinding) *bindingRow {
	return &bindingRow{
		ObjectName: cache.MetaObjectToName(in), identity: in.Spec.AzureIdentity, selector: in.Spec.Selector,
		created: in.CreationTimestamp.Unix(),
	}
}

func exceptionRowOf(in *aadpodidentity.AzurePodIdentityException) *exceptionRow {
	return &exceptionRow{ObjectName: cache.MetaObjectToName(in), labels: in.Spec.PodLabels}
}

// assignedRowFor returns the parser for the assignments to one node's pods.
func assignedRowFor(node string) func(*aadpodidentity.AzureAssignedIdentity) *assignedRow {
	return func(in *aadpodidentity.AzureAssignedIdentity) *assignedRow {
		if in.Spec.NodeName != node || in.Spec.AzureIdentityRef == nil {
			return nil
		}
		row := &assignedRow{
			ObjectName: cache.MetaObjectToName(in), pod: cache.NewObjectName(in.Spec.PodNamespace, in.Spec.Pod), identity: *identityRowOf(in.Spec.AzureIdentityRef),
			// MIC wrote no state at all before there were any. The remaining one
			// is Unassigned: on its way out.
			ready:  in.Status.Status == "" || in.Status.Status == aadpodidentity.Assigned,
			coming: in.Status.Status == aadpodidentity.Created,
		}
		if in.Spec.AzureBindingRef != nil {
			row.binding = *bindingRowOf(in.Spec.AzureBindingRef)
		}
		return row
	}
}
