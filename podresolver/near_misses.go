package podresolver

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Hint describes objects that nearly give the pod an identity, for an error that wraps
// ErrNoIdentity; "" if there are none. It looks at every binding: use it for log lines only.
func (r *Resolver) Hint(err error) string {
	var refusal *refusalError
	if !errors.As(err, &refusal) {
		return ""
	}
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	return joinFirst(r.nearMissesLocked(refusal.pod.info))
}

// nearMissesLocked describes objects that would match the pod if they did not differ in case or
// namespace.
func (r *Resolver) nearMissesLocked(info *podInfo) []string {
	var near []string
	label := info.labels[aadpodidentity.BindingLabel]
	for _, key := range slices.Sorted(maps.Keys(info.labels)) {
		if key != aadpodidentity.BindingLabel && strings.EqualFold(key, aadpodidentity.BindingLabel) {
			near = append(near, fmt.Sprintf("its label %q differs in case from %q", key, aadpodidentity.BindingLabel))
			label = cmp.Or(label, info.labels[key])
		}
	}
	near = append(near, r.nearExceptionsLocked(info)...)
	if label == "" {
		return near
	}
	near = append(near, r.nearBindingsLocked(info, label)...)
	for _, c := range r.candidatesLocked(info) {
		if r.objects.identities[cache.NewObjectName(c.binding.Namespace, c.binding.identity)] == nil {
			near = append(near, r.nearIdentitiesLocked(c.binding)...)
		}
	}
	return near
}

func (r *Resolver) nearBindingsLocked(info *podInfo, label string) []string {
	var near []*bindingInfo
	for _, b := range r.objects.bindings {
		if strings.EqualFold(b.selector, label) && (b.selector != label || b.Namespace != info.Namespace && !r.objects.acrossNamespaces) {
			near = append(near, b)
		}
	}
	slices.SortFunc(near, compareBindings)
	return describeFirst(near, func(b *bindingInfo) string {
		if b.selector != label {
			return fmt.Sprintf("AzureIdentityBinding %s does not match: its selector %q differs in case", b.ObjectName, b.selector)
		}
		return fmt.Sprintf("AzureIdentityBinding %s does not match: it is in another namespace", b.ObjectName)
	})
}

// nearIdentitiesLocked is for a binding whose AzureIdentity does not exist.
func (r *Resolver) nearIdentitiesLocked(b *bindingInfo) []string {
	var near []*identityInfo
	for _, id := range r.objects.identities {
		if strings.EqualFold(id.Name, strings.TrimSpace(b.identity)) {
			near = append(near, id)
		}
	}
	slices.SortFunc(near, func(a, b *identityInfo) int { return compareNames(a.ObjectName, b.ObjectName) })
	return describeFirst(near, func(id *identityInfo) string {
		if id.Namespace != b.Namespace {
			return fmt.Sprintf("AzureIdentity %s does not match AzureIdentityBinding %q: it is in another namespace", id.ObjectName, b.Name)
		}
		return fmt.Sprintf("AzureIdentity %s does not match AzureIdentityBinding %q, which names %q", id.ObjectName, b.Name, b.identity)
	})
}

// nearExceptionsLocked is for a pod that is not excepted.
func (r *Resolver) nearExceptionsLocked(info *podInfo) []string {
	type miss struct {
		*exceptionInfo
		text string
	}
	var near []miss
	for _, e := range r.objects.exceptions {
		switch key := matchedLabel(info.labels, e.labels); {
		case key != "" && e.Namespace != info.Namespace:
			near = append(near, miss{e, fmt.Sprintf("AzurePodIdentityException %s lists its label %s=%s but does not apply: it is in another namespace", e.ObjectName, key, info.labels[key])})
		case key == "" && e.Namespace == info.Namespace:
			if key, wanted := foldedLabel(info.labels, e.labels); key != "" {
				near = append(near, miss{e, fmt.Sprintf("AzurePodIdentityException %s does not apply: the pod's label %q differs in case from %q", e.ObjectName, key, wanted)})
			}
		}
	}
	slices.SortFunc(near, func(a, b miss) int { return compareNames(a.ObjectName, b.ObjectName) })
	return describeFirst(near, func(m miss) string { return m.text })
}

// foldedLabel is matchedLabel for keys that only differ in case; it also returns the wanted
// key.
func foldedLabel(have, want map[string]string) (key, wanted string) {
	for _, wanted := range slices.Sorted(maps.Keys(want)) {
		for _, key := range slices.Sorted(maps.Keys(have)) {
			if strings.EqualFold(key, wanted) && strings.EqualFold(have[key], want[wanted]) {
				return key, wanted
			}
		}
	}
	return "", ""
}

// describeFirst describes the first few objects, and says how many more there are.
func describeFirst[T any](objects []T, describe func(T) string) []string {
	var all []string
	for i, o := range objects {
		if i == maxDescribed {
			return append(all, fmt.Sprintf("%d more do not match either", len(objects)-maxDescribed))
		}
		all = append(all, describe(o))
	}
	return all
}

func compareNames(a, b cache.ObjectName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
