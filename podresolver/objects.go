package podresolver

import (
	"slices"
	"sync"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// selectorKey is a binding's selector, or the label that it matches, in a namespace.
type selectorKey struct{ namespace, selector string }

// multimap is an index: values by a key that several have.
type multimap[K comparable, V any] map[K][]*V

// set adds a value or removes it.
func (m multimap[K, V]) set(key K, value *V, present bool) {
	if present {
		m[key] = append(m[key], value)
		return
	}
	if rest := slices.DeleteFunc(m[key], func(v *V) bool { return v == value }); len(rest) > 0 {
		m[key] = rest
	} else {
		delete(m, key)
	}
}

// tables are the objects, indexed by what decisions ask for, and the pods for
// which a decision must be taken anew.
type tables struct {
	mu sync.Mutex // guards all of them

	pods       map[cache.ObjectName]*podRow
	identities map[cache.ObjectName]*identityRow
	bindings   map[cache.ObjectName]*bindingRow
	exceptions map[cache.ObjectName]*exceptionRow
	assigned   map[cache.ObjectName]*assignedRow

	podsByLabel        multimap[selectorKey, podRow] // by the value of BindingLabel
	bindingsBySelector multimap[selectorKey, bindingRow]
	bindingsByIdentity multimap[cache.ObjectName, bindingRow]
	exceptionsByNS     multimap[string, exceptionRow]
	assignedByPod      multimap[cache.ObjectName, assignedRow]

	acrossNamespaces bool // bindings match pods of other namespaces

	dirty map[cache.ObjectName]struct{} // pods
	wake  chan struct{}                 // of capacity 1: something is dirty
}

func newTables(acrossNamespaces bool) *tables {
	return &tables{
		pods:               make(map[cache.ObjectName]*podRow),
		identities:         make(map[cache.ObjectName]*identityRow),
		bindings:           make(map[cache.ObjectName]*bindingRow),
		exceptions:         make(map[cache.ObjectName]*exceptionRow),
		assigned:           make(map[cache.ObjectName]*assignedRow),
		podsByLabel:        make(multimap[selectorKey, podRow]),
		bindingsBySelector: make(multimap[selectorKey, bindingRow]),
		bindingsByIdentity: make(multimap[cache.ObjectName, bindingRow]),
		exceptionsByNS:     make(multimap[string, exceptionRow]),
		assignedByPod:      make(multimap[cache.ObjectName, assignedRow]),
		acrossNamespaces:   acrossNamespaces,
		dirty:              make(map[cache.ObjectName]struct{}),
		wake:               make(chan struct{}, 1),
	}
}

// key is where a selector meets the labels that it can match.
func (t *tables) key(namespace, selector string) selectorKey {
	if t.acrossNamespaces {
		namespace = ""
	}
	return selectorKey{namespace, selector}
}

func (t *tables) markLabel(key selectorKey) {
	for _, pod := range t.podsByLabel[key] {
		t.dirty[pod.ObjectName] = struct{}{}
	}
}

// The changed… functions keep the indexes, and mark the pods that a change bears on.
// They are called for what a row was before, then for what it is after.

func (t *tables) changedPod(pod *podRow, present bool) {
	t.dirty[pod.ObjectName] = struct{}{}
	t.podsByLabel.set(t.key(pod.Namespace, pod.labels[aadpodidentity.BindingLabel]), pod, present)
}

func (t *tables) changedBinding(b *bindingRow, present bool) {
	key := t.key(b.Namespace, b.selector)
	t.markLabel(key)
	t.bindingsBySelector.set(key, b, present)
	t.bindingsByIdentity.set(cache.NewObjectName(b.Namespace, b.identity), b, present)
}

func (t *tables) changedIdentity(id *identityRow, _ bool) {
	for _, b := range t.bindingsByIdentity[id.ObjectName] {
		t.markLabel(t.key(b.Namespace, b.selector))
	}
}

func (t *tables) changedException(e *exceptionRow, present bool) {
	t.exceptionsByNS.set(e.Namespace, e, present)
	for pod := range t.pods { // this node's: some hundreds at most
		if pod.Namespace == e.Namespace {
			t.dirty[pod] = struct{}{}
		}
	}
}

func (t *tables) changedAssigned(a *assignedRow, present bool) {
	t.dirty[a.pod] = struct{}{}
	t.assignedByPod.set(a.pod, a, present)
}
