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

// Hint says more of an error of a request.
type Hint struct {
	Reason     string // see Reason; "" for errors of other packages
	Fix        string // what to do; "" if that is not known
	NearMisses string // the objects that nearly give the pod an identity; "" if there are none
}

// Hint says the precise reason of an error that wraps ErrNoIdentity, and what nearly matches. It
// looks at every binding: use it for log lines only.
func (r *Resolver) Hint(err error) Hint {
	var refusal *refusalError
	if !errors.As(err, &refusal) {
		why := causeOf(err)
		return Hint{Reason: why.reason, Fix: why.fix}
	}
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	near := r.nearMissesLocked(refusal.pod.info)
	var texts []string
	for _, miss := range near {
		texts = append(texts, miss.text)
	}
	why := r.noIdentityLocked(refusal.pod, near)
	return Hint{Reason: why.reason, Fix: why.fix, NearMisses: joinFirst(texts)}
}

// nearMiss describes an object that would match the pod if it did not differ in case or
// namespace.
type nearMiss struct {
	text string
	cause
}

// nearMissesLocked lists them: those of the pod's label, of exceptions, of bindings and of
// identities.
func (r *Resolver) nearMissesLocked(info *podInfo) []nearMiss {
	near, label := nearLabels(info)
	near = append(near, r.nearExceptionsLocked(info)...)
	return append(near, r.nearBindingsLocked(info, label)...)
}

// nearLabels is for keys that differ in case from BindingLabel. label is the value that the pod
// seems to be meant to have.
func nearLabels(info *podInfo) (near []nearMiss, label string) {
	label = info.labels[aadpodidentity.BindingLabel]
	for _, key := range slices.Sorted(maps.Keys(info.labels)) {
		if len(near) == maxDescribed { // there are 32,767 other spellings
			break
		}
		if key != aadpodidentity.BindingLabel && strings.EqualFold(key, aadpodidentity.BindingLabel) {
			near = append(near, nearMiss{
				fmt.Sprintf("its label %q differs in case from %q", key, aadpodidentity.BindingLabel),
				cause{SelectorCaseDiffers, fmt.Sprintf("rename the pod's label %q (in its controller's template) to %q", key, aadpodidentity.BindingLabel)},
			})
			label = cmp.Or(label, info.labels[key])
		}
	}
	return near, label
}

// nearBindingsLocked is for a label's value; "" for a pod without.
func (r *Resolver) nearBindingsLocked(info *podInfo, label string) (all []nearMiss) {
	if label == "" {
		return nil
	}
	var near []*bindingInfo
	for _, b := range r.objects.bindings {
		if strings.EqualFold(b.selector, label) && (b.selector != label || b.Namespace != info.Namespace && !r.objects.acrossNamespaces) {
			near = append(near, b)
		}
	}
	elsewhere := func(b *bindingInfo) bool { return b.Namespace != info.Namespace && !r.objects.acrossNamespaces }
	slices.SortFunc(near, func(a, b *bindingInfo) int {
		if elsewhere(a) != elsewhere(b) { // one in the pod's namespace is more likely to be meant
			return map[bool]int{true: 1, false: -1}[elsewhere(a)]
		}
		return compareBindings(a, b)
	})
	all = describeFirst(near, func(b *bindingInfo) (miss nearMiss) {
		miss.text = fmt.Sprintf("AzureIdentityBinding %s does not match: its selector %q differs in case", b.ObjectName, b.selector)
		whose := "AzureIdentityBinding " + b.String()
		if b.Namespace != info.Namespace {
			whose = "an AzureIdentityBinding of another namespace"
		}
		miss.cause = cause{SelectorCaseDiffers, fmt.Sprintf("set the pod's label %s (in its controller's template) to %q, the selector of %s", aadpodidentity.BindingLabel, b.selector, whose)}
		if b.selector == label {
			miss.text = fmt.Sprintf("AzureIdentityBinding %s does not match: it is in another namespace", b.ObjectName)
		}
		if elsewhere(b) {
			miss.cause = cause{BindingInOtherNamespace, fmt.Sprintf("create the AzureIdentityBinding, and its AzureIdentity, in namespace %q, with the selector %q: those of another namespace count for its own pods alone", info.Namespace, label)} // it names no other namespace: see package events
		}
		return miss
	})
	missing := 0
	for _, c := range r.candidatesLocked(info) {
		if c.missing && missing < maxDescribed { // each looks at every identity
			missing++
			all = append(all, r.nearIdentitiesLocked(c.binding)...)
		}
	}
	return all
}

// nearIdentitiesLocked is for a binding whose AzureIdentity does not exist.
func (r *Resolver) nearIdentitiesLocked(b *bindingInfo) []nearMiss {
	var near []*identityInfo
	name := strings.TrimSpace(b.identity)
	for _, id := range r.objects.identities {
		if strings.EqualFold(id.Name, name) {
			near = append(near, id)
		}
	}
	slices.SortFunc(near, func(a, b *identityInfo) int { return compareNames(a.ObjectName, b.ObjectName) })
	return describeFirst(near, func(id *identityInfo) nearMiss {
		if id.Namespace != b.Namespace {
			return nearMiss{text: fmt.Sprintf("AzureIdentity %s does not match AzureIdentityBinding %q: it is in another namespace", id.ObjectName, b.Name)}
		}
		return nearMiss{text: fmt.Sprintf("AzureIdentity %s does not match AzureIdentityBinding %q, which names %q", id.ObjectName, b.Name, b.identity)}
	})
}

// nearExceptionsLocked is for a pod that is not excepted. One of another namespace is nothing to
// fix: it is meant for other pods.
func (r *Resolver) nearExceptionsLocked(info *podInfo) []nearMiss {
	type miss struct {
		*exceptionInfo
		nearMiss
	}
	var near []miss
	if info.labelsCut {
		return []nearMiss{{text: fmt.Sprintf("no AzurePodIdentityException applies: it has more than %d KiB of labels, of which the agent knows %q alone", maxLabels>>10, aadpodidentity.BindingLabel)}}
	}
	folded := make(map[string]string, len(info.labels)) // the pod's keys by their lower case
	for key := range info.labels {
		lower := strings.ToLower(key)
		if other, ok := folded[lower]; !ok || key < other {
			folded[lower] = key
		}
	}
	for _, e := range r.objects.exceptions {
		switch key := matchedLabel(info.labels, e.labels); {
		case e.labelsCut && key == "" && e.Namespace == info.Namespace:
			near = append(near, miss{e, nearMiss{text: fmt.Sprintf("AzurePodIdentityException %s does not apply: it lists more than %d KiB of labels", e.ObjectName, maxLabels>>10)}})
		case key != "" && e.Namespace != info.Namespace:
			near = append(near, miss{e, nearMiss{text: fmt.Sprintf("AzurePodIdentityException %s lists its label %s=%s but does not apply: it is in another namespace", e.ObjectName, key, info.labels[key])}})
		case key == "" && e.Namespace == info.Namespace:
			if key, wanted := foldedLabel(info.labels, folded, e.labels); key != "" {
				near = append(near, miss{e, nearMiss{
					fmt.Sprintf("AzurePodIdentityException %s does not apply: the pod's label %q differs in case from %q", e.ObjectName, key, wanted),
					cause{SelectorCaseDiffers, fmt.Sprintf("rename the pod's label %q to %q, as AzurePodIdentityException %s has it", key, wanted, e.ObjectName)},
				}})
			}
		}
	}
	slices.SortFunc(near, func(a, b miss) int { return compareNames(a.ObjectName, b.ObjectName) })
	return describeFirst(near, func(m miss) nearMiss { return m.nearMiss })
}

// foldedLabel is matchedLabel for keys that only differ in case; it also returns the wanted
// key. folded has the keys of have by their lower case. Authors of pods and of exceptions have any
// number of labels, so it looks at each once.
func foldedLabel(have, folded, want map[string]string) (key, wanted string) {
	for name, value := range want {
		k, ok := folded[strings.ToLower(name)]
		if ok && strings.EqualFold(have[k], value) && (wanted == "" || name < wanted) {
			key, wanted = k, name
		}
	}
	return key, wanted
}

// describeFirst describes the first few objects, and says how many more there are.
func describeFirst[T any](objects []T, describe func(T) nearMiss) []nearMiss {
	var all []nearMiss
	for i, o := range objects {
		if i == maxDescribed {
			return append(all, nearMiss{text: fmt.Sprintf("%d more do not match either", len(objects)-maxDescribed)})
		}
		all = append(all, describe(o))
	}
	return all
}

func compareNames(a, b cache.ObjectName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
