package podresolver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Decision is what has been decided for a pod and why, for an operator to read.
type Decision struct {
	Pod        string // namespace/name
	Addresses  []netip.Addr
	Label      string     // value of the pod's label aadpodidbinding
	Exception  string     // that applies; "" if none does
	Identities []Identity // that the pod may use, the default first
	Pending    []Identity // that it may use once MIC has assigned them
	Reasons    []string   // a sentence for each object that had a part in it, or nearly had
}

// String is the decision in some lines.
func (d Decision) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "pod %s", d.Pod)
	for _, addr := range d.Addresses {
		fmt.Fprintf(&b, ", %s", addr)
	}
	b.WriteString("\n")
	switch {
	case d.Exception != "":
		fmt.Fprintf(&b, "is excepted by %q: what it sends to IMDS is passed on, and it gets what the node gets\n", d.Exception)
	case len(d.Identities)+len(d.Pending) == 0:
		b.WriteString("may use no identity\n")
	}
	for i, id := range d.Identities {
		which := "may use"
		if i == 0 {
			which = "gets, unless it names another,"
		}
		fmt.Fprintf(&b, "%s %s\n", which, id)
	}
	for _, id := range d.Pending {
		if !slices.ContainsFunc(d.Identities, func(has Identity) bool { return has.Namespace == id.Namespace && has.Name == id.Name }) {
			fmt.Fprintf(&b, "will get %s, when MIC has assigned it\n", id)
		}
	}
	if len(d.Reasons) > 0 {
		b.WriteString("because\n")
	}
	for _, reason := range d.Reasons {
		fmt.Fprintf(&b, "- %s\n", reason)
	}
	return b.String()
}

// String names the identity as its owner would.
func (id Identity) String() string {
	text := fmt.Sprintf("AzureIdentity %s/%s (%s", id.Namespace, id.Name, id.Type)
	if id.ClientID != "" {
		text += ", client ID " + id.ClientID
	}
	if id.ResourceID != "" {
		text += ", " + id.ResourceID
	}
	if p := id.Principal; p != nil {
		text += fmt.Sprintf(", tenant %s, secret %s/%s", p.TenantID, p.SecretNamespace, p.SecretName)
	}
	return text + ")"
}

// Explain decides anew for a pod of the node, and says why. Its error means that there
// is no such pod. It needs Synced, and is not for the road of requests: it looks at
// every binding.
func (r *Resolver) Explain(namespace, podName string) (Decision, error) {
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	row := r.tables.pods[ref{namespace, podName}]
	if row == nil {
		return Decision{}, fmt.Errorf("%s/%s: there is no such pod on this node", namespace, podName)
	}
	p := r.decide(row)
	d := Decision{
		Pod: p.String(), Addresses: row.addrs, Label: row.labels[aadpodidentity.BindingLabel],
		Exception: p.exception, Identities: p.identities, Pending: p.pending,
	}
	say := func(format string, args ...any) { d.Reasons = append(d.Reasons, fmt.Sprintf(format, args...)) }
	switch {
	case row.hostNetwork:
		say("it is on the host network: the kernel does not redirect what it sends, and it has what the node has")
	case len(row.addrs) == 0:
		say("it has no address, or none any more")
	}
	if p.exception != "" {
		r.explainException(row, p.exception, say)
		return d, nil
	}
	if _, ignored := r.exceptionOf(row); ignored != "" {
		say("%s", ignored)
	}
	if d.Label == "" {
		say("it has no label %q", aadpodidentity.BindingLabel)
	}
	before := len(d.Reasons)
	if r.cfg.Mode == Standard {
		for _, a := range r.tables.assignedByPod[row.ref] {
			but := ""
			if _, why := r.assigned(a, row); why != "" {
				but = ", but it " + why
			} else if !a.ready {
				but = ", but not yet, or not any more"
			}
			say("AzureAssignedIdentity %q assigns AzureIdentity %s/%s to it%s", a.name, a.identity.namespace, a.identity.name, but)
		}
	}
	r.explainBindings(row, say)
	if d.Label != "" && len(d.Reasons) == before {
		say("no AzureIdentityBinding has the selector %q", d.Label)
	}
	var all []Identity
	for _, id := range slices.Concat(d.Identities, d.Pending) {
		p.add(&all, id)
	}
	for _, id := range all {
		if id.ClientID == "" && len(r.cfg.Deny.ClientIDs) > 0 {
			say("AzureIdentity %q gives no client ID: if its tokens are for one that --%s withholds, the agent hands out none", id.Name, DenyIdentityFlag)
		}
	}
	return d, nil
}

func (r *Resolver) explainException(row *podRow, name string, say func(string, ...any)) {
	for _, e := range r.tables.exceptionsByNS[row.namespace] {
		if key := matchedLabel(row.labels, e.labels); e.name == name && key != "" {
			say("AzurePodIdentityException %q lists its label %s=%s", name, key, row.labels[key])
			return
		}
	}
	say("it is a pod of the Deployment mic in namespace %q", row.namespace)
}

// explainBindings says what the bindings give to a pod, and which ones nearly do.
func (r *Resolver) explainBindings(row *podRow, say func(string, ...any)) {
	label := row.labels[aadpodidentity.BindingLabel]
	if label == "" {
		return
	}
	for _, c := range r.candidates(row) {
		switch {
		case c.why != "":
			say("%s", c)
		default:
			say("AzureIdentityBinding %q has the selector %q and gives it AzureIdentity %q", c.Binding, label, c.Name)
		}
	}
	var near []*bindingRow
	for _, b := range r.tables.bindings {
		if strings.EqualFold(b.selector, label) && (b.selector != label || b.namespace != row.namespace && !r.tables.acrossNamespaces) {
			near = append(near, b)
		}
	}
	slices.SortFunc(near, preferred)
	for i, b := range near {
		const few = 10
		switch {
		case i == few:
			say("%d more have this selector elsewhere", len(near)-few)
			return
		case b.selector != label:
			say("AzureIdentityBinding %s/%s does not match: its selector %q differs in case", b.namespace, b.name, b.selector)
		default:
			say("AzureIdentityBinding %s/%s does not match: it is in another namespace", b.namespace, b.name)
		}
	}
}

// NodeOf asks the API server which node a pod is on.
func NodeOf(ctx context.Context, config *rest.Config, namespace, podName string) (string, error) {
	c, err := client(config, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf, corev1.AddToScheme)
	if err != nil {
		return "", err
	}
	var list corev1.PodList
	err = c.Get().Namespace(namespace).Resource("pods").
		VersionedParams(&metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", podName).String()}, metav1.ParameterCodec).
		Do(ctx).Into(&list)
	switch {
	case err != nil:
		return "", advise("pods", err)
	case len(list.Items) == 0:
		return "", fmt.Errorf("%s/%s: there is no such pod", namespace, podName)
	case list.Items[0].Spec.NodeName == "":
		return "", fmt.Errorf("%s/%s is on no node yet", namespace, podName)
	}
	return list.Items[0].Spec.NodeName, nil
}
