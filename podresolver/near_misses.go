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

// Hint says what nearly gives the pod an identity, for an error that wraps ErrNoIdentity;
// "" if nothing does. It looks at every binding: it is for lines of the log, of which there
// are few.
func (r *Resolver) Hint(err error) string {
	var refusal *refused
	if !errors.As(err, &refusal) {
		return ""
	}
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	return some(r.nearMisses(refusal.pod.row))
}

// nearMisses are sentences about what would match the pod if a letter had another case or
// an object were in another namespace. The tables are locked.
func (r *Resolver) nearMisses(row *podRow) []string {
	var near []string
	label := row.labels[aadpodidentity.BindingLabel]
	for _, key := range slices.Sorted(maps.Keys(row.labels)) {
		if key != aadpodidentity.BindingLabel && strings.EqualFold(key, aadpodidentity.BindingLabel) {
			near = append(near, fmt.Sprintf("its label %q is not %q: it differs in case", key, aadpodidentity.BindingLabel))
			label = cmp.Or(label, row.labels[key])
		}
	}
	near = append(near, r.nearExceptions(row)...)
	if label == "" {
		return near
	}
	near = append(near, r.nearBindings(row, label)...)
	for _, c := range r.candidates(row) {
		if r.tables.identities[cache.NewObjectName(c.binding.Namespace, c.binding.identity)] == nil {
			near = append(near, r.nearIdentities(c.binding)...)
		}
	}
	return near
}

func (r *Resolver) nearBindings(row *podRow, label string) []string {
	var near []*bindingRow
	for _, b := range r.tables.bindings {
		if strings.EqualFold(b.selector, label) && (b.selector != label || b.Namespace != row.Namespace && !r.tables.acrossNamespaces) {
			near = append(near, b)
		}
	}
	slices.SortFunc(near, preferred)
	return sentences(near, func(b *bindingRow) string {
		if b.selector != label {
			return fmt.Sprintf("AzureIdentityBinding %s/%s does not match: its selector %q differs in case", b.Namespace, b.Name, b.selector)
		}
		return fmt.Sprintf("AzureIdentityBinding %s/%s does not match: it is in another namespace", b.Namespace, b.Name)
	})
}

// nearIdentities are about a binding whose AzureIdentity does not exist.
func (r *Resolver) nearIdentities(b *bindingRow) []string {
	var near []*identityRow
	for _, id := range r.tables.identities {
		if strings.EqualFold(id.Name, strings.TrimSpace(b.identity)) {
			near = append(near, id)
		}
	}
	slices.SortFunc(near, func(a, b *identityRow) int { return compareNames(a.ObjectName, b.ObjectName) })
	return sentences(near, func(id *identityRow) string {
		if id.Namespace != b.Namespace {
			return fmt.Sprintf("AzureIdentity %s/%s does not match: it is in another namespace than AzureIdentityBinding %q", id.Namespace, id.Name, b.Name)
		}
		return fmt.Sprintf("AzureIdentity %s/%s does not match: AzureIdentityBinding %q spells it %q", id.Namespace, id.Name, b.Name, b.identity)
	})
}

// nearExceptions are about a pod that is not excepted.
func (r *Resolver) nearExceptions(row *podRow) []string {
	type miss struct {
		*exceptionRow
		text string
	}
	var near []miss
	for _, e := range r.tables.exceptions {
		switch key := matchedLabel(row.labels, e.labels); {
		case key != "" && e.Namespace != row.Namespace:
			near = append(near, miss{e, fmt.Sprintf("AzurePodIdentityException %s/%s lists its label %s=%s, and does not except it: it is in another namespace", e.Namespace, e.Name, key, row.labels[key])})
		case key == "" && e.Namespace == row.Namespace:
			if key, wanted := foldedLabel(row.labels, e.labels); key != "" {
				near = append(near, miss{e, fmt.Sprintf("AzurePodIdentityException %s/%s does not except it: its label %q differs in case from %q", e.Namespace, e.Name, key, wanted)})
			}
		}
	}
	slices.SortFunc(near, func(a, b miss) int { return compareNames(a.ObjectName, b.ObjectName) })
	return sentences(near, func(m miss) string { return m.text })
}

// foldedLabel is matchedLabel for keys that differ in case alone, with the wanted key.
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

// sentences are about the first few objects, and say how many more there are.
func sentences[T any](objects []T, sentence func(T) string) []string {
	var all []string
	for i, o := range objects {
		if i == maxListed {
			return append(all, fmt.Sprintf("%d more do not match either", len(objects)-maxListed))
		}
		all = append(all, sentence(o))
	}
	return all
}

func compareNames(a, b cache.ObjectName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
