package podresolver

import (
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

var addr = netip.MustParseAddr("10.244.0.7")

func named(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: "shop", Name: name}
}

// with changes an object and returns it.
func with[T any](object *T, change func(*T)) *T {
	change(object)
	return object
}

// guid makes a client ID of a short text, in the same case; "" of "".
func guid(text string) string {
	if text == "" {
		return ""
	}
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(strings.ToLower(text))))
	id := strings.Join([]string{sum[:8], sum[8:12], sum[12:16], sum[16:20], sum[20:32]}, "-")
	if text != strings.ToLower(text) {
		return strings.ToUpper(id)
	}
	return id
}

// path makes a resource ID of a short text; "" of "".
func path(text string) string {
	if text == "" {
		return ""
	}
	return "/subscriptions/S/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + strings.ReplaceAll(strings.Trim(text, "/"), "/", "-")
}

func identity(name, clientID, resourceID string) *aadpodidentity.AzureIdentity {
	return &aadpodidentity.AzureIdentity{
		ObjectMeta: named(name),
		Spec:       aadpodidentity.AzureIdentitySpec{ClientID: clientID, ResourceID: resourceID},
	}
}

func binding(name, selector, identity string, age time.Duration) *aadpodidentity.AzureIdentityBinding {
	b := &aadpodidentity.AzureIdentityBinding{
		ObjectMeta: named(name),
		Spec:       aadpodidentity.AzureIdentityBindingSpec{Selector: selector, AzureIdentity: identity},
	}
	b.CreationTimestamp = metav1.NewTime(time.Unix(1_700_000_000, 0).Add(-age))
	return b
}

func exception(name string, labels map[string]string) *aadpodidentity.AzurePodIdentityException {
	return &aadpodidentity.AzurePodIdentityException{
		ObjectMeta: named(name),
		Spec:       aadpodidentity.AzurePodIdentityExceptionSpec{PodLabels: labels},
	}
}

// assigned is the assignment that MIC creates for a pod of node1.
func assigned(name, podName, state string, id *aadpodidentity.AzureIdentity, b *aadpodidentity.AzureIdentityBinding) *aadpodidentity.AzureAssignedIdentity {
	return &aadpodidentity.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: aadpodidentity.AzureAssignedIdentitySpec{
			AzureIdentityRef: id, AzureBindingRef: b, Pod: podName, PodNamespace: "shop", NodeName: "node1",
		},
		Status: aadpodidentity.AzureAssignedIdentityStatus{Status: state},
	}
}

// newPod is a running pod of node1, without a label if label is "".
func newPod(name, ip, label string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: named(name),
		Spec:       corev1.PodSpec{NodeName: "node1"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
	}
	p.UID = types.UID("uid-of-" + name)
	if label != "" {
		p.Labels = map[string]string{aadpodidentity.BindingLabel: label}
	}
	return p
}

func in[T metav1.Object](namespace string, object T) T {
	object.SetNamespace(namespace)
	return object
}

// store is what a reflector fills.
type store interface {
	cache.ReflectorStore
	cache.TransformingStore
}

// harness is a resolver without its goroutines: the test does what reflectors do, and calls
// update.
type harness struct {
	*Resolver
	stores struct{ pods, identities, bindings, exceptions, assigned store }
}

func newHarness(tb testing.TB, cfg Config, objects ...any) *harness {
	tb.Helper()
	cfg.Node = "node1"
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	r, err := New(Sources{}, cfg)
	require.NoError(tb, err)
	close(r.synced)
	d, t := &harness{Resolver: r}, r.objects
	ignore := func(bool) {}
	d.stores.pods = &reflectorStore[podInfo]{t, t.pods, trimAny(r.trimPod), t.podChangedLocked, ignore}
	d.stores.identities = &reflectorStore[identityInfo]{t, t.identities, trimAny(newIdentityInfo), t.identityChangedLocked, ignore}
	d.stores.bindings = &reflectorStore[bindingInfo]{t, t.bindings, trimAny(newBindingInfo), t.bindingChangedLocked, ignore}
	d.stores.exceptions = &reflectorStore[exceptionInfo]{t, t.exceptions, trimAny(newExceptionInfo), t.exceptionChangedLocked, ignore}
	d.stores.assigned = &reflectorStore[assignmentInfo]{t, t.assigned, trimAny(assignmentInfoFor(cfg.Node)), t.assignmentChangedLocked, ignore}
	d.put(objects...)
	return d
}

func (d *harness) put(objects ...any) {
	for _, object := range objects {
		_ = d.storeOf(object).Add(object)
	}
}

func (d *harness) drop(objects ...any) {
	for _, object := range objects {
		_ = d.storeOf(object).Delete(object)
	}
}

func (d *harness) storeOf(object any) store {
	switch object.(type) {
	case *corev1.Pod:
		return d.stores.pods
	case *aadpodidentity.AzureIdentity:
		return d.stores.identities
	case *aadpodidentity.AzureIdentityBinding:
		return d.stores.bindings
	case *aadpodidentity.AzurePodIdentityException:
		return d.stores.exceptions
	default:
		return d.stores.assigned
	}
}

// decide is the decision for a pod now.
func (d *harness) decide(pod *corev1.Pod) *Pod { return d.decideLocked(d.trimPod(pod)) }

// explain is the text of Explain for pod "shop/p".
func (d *harness) explain(tb testing.TB) string {
	tb.Helper()
	d.update()
	told, err := d.Explain("shop", "p", nil)
	require.NoError(tb, err)
	return told.String()
}

// names are the names of identities.
func names(identities []Identity) []string {
	var all []string
	for _, id := range identities {
		all = append(all, id.Name)
	}
	return all
}
