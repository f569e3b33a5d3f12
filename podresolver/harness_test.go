package podresolver

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

var addr = netip.MustParseAddr("10.244.0.7")

// store is what a reflector fills.
type store interface {
	cache.ReflectorStore
	cache.TransformingStore
}

// harness is a resolver without its goroutines: the test does what reflectors do, and calls
// update.
type harness struct {
	*Resolver
	stores struct{ pods, identities, bindings, exceptions, assigned, accounts store }
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
	d.stores.accounts = &reflectorStore[accountInfo]{t, t.accounts, trimAny(newAccountInfo), t.accountChangedLocked, ignore}
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
	case *metav1.PartialObjectMetadata:
		return d.stores.accounts
	default:
		return d.stores.assigned
	}
}

// decide is the decision for a pod now.
func (d *harness) decide(pod *corev1.Pod) *Pod { return d.decideLocked(d.trimPod(pod)) }

// explain is what Explain says of pod "shop/p": the state, name and text of each step, a line
// for each text, and the reason and the fix of a refusal.
func (d *harness) explain(tb testing.TB) string {
	tb.Helper()
	d.update()
	told, err := d.Explain("shop", "p", Selector{}, nil)
	require.NoError(tb, err)
	var b strings.Builder
	for _, step := range told.Steps {
		for _, text := range step.Texts {
			fmt.Fprintf(&b, "%s %s: %s\n", step.State, step.Name, text)
		}
	}
	if told.Refusal != nil {
		fmt.Fprintf(&b, "%s: %s\n", told.Reason, told.Fix)
	}
	return b.String()
}

// names are the names of identities.
func names(identities []Identity) []string {
	var all []string
	for _, id := range identities {
		all = append(all, id.Name)
	}
	return all
}
