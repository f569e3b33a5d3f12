package podresolver

import (
	"slices"
	"sync"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// objects are the trimmed objects of the cluster, indexed by what decisions look up, and the
// pods that have to be decided again.
type objects struct {
	mu sync.Mutex // guards all following fields

	pods       map[cache.ObjectName]*podInfo
	identities map[cache.ObjectName]*identityInfo
	bindings   map[cache.ObjectName]*bindingInfo
	exceptions map[cache.ObjectName]*exceptionInfo
	assigned   map[cache.ObjectName]*assignmentInfo
	accounts   map[cache.ObjectName]*accountInfo // empty without Federation.ServiceAccounts

	podsByLabel        multimap[selectorKey, podInfo] // by the value of BindingLabel
	bindingsBySelector multimap[selectorKey, bindingInfo]
	bindingsByIdentity multimap[cache.ObjectName, bindingInfo]
	exceptionsByNS     multimap[string, exceptionInfo]
	assignedByPod      multimap[cache.ObjectName, assignmentInfo]
	assignedByIdentity multimap[cache.ObjectName, assignmentInfo]

	acrossNamespaces bool // bindings match pods of other namespaces

	lookedUp []*podInfo // the last that look-ups have found, the newest first, maxLookedUp at most

	dirty map[cache.ObjectName]struct{} // pods to decide again
	wake  chan struct{}                 // of capacity 1: there are dirty pods
}

func newObjects(acrossNamespaces bool) *objects {
	return &objects{
		pods:               make(map[cache.ObjectName]*podInfo),
		identities:         make(map[cache.ObjectName]*identityInfo),
		bindings:           make(map[cache.ObjectName]*bindingInfo),
		exceptions:         make(map[cache.ObjectName]*exceptionInfo),
		assigned:           make(map[cache.ObjectName]*assignmentInfo),
		accounts:           make(map[cache.ObjectName]*accountInfo),
		podsByLabel:        make(multimap[selectorKey, podInfo]),
		bindingsBySelector: make(multimap[selectorKey, bindingInfo]),
		bindingsByIdentity: make(multimap[cache.ObjectName, bindingInfo]),
		exceptionsByNS:     make(multimap[string, exceptionInfo]),
		assignedByPod:      make(multimap[cache.ObjectName, assignmentInfo]),
		assignedByIdentity: make(multimap[cache.ObjectName, assignmentInfo]),
		acrossNamespaces:   acrossNamespaces,
		dirty:              make(map[cache.ObjectName]struct{}),
		wake:               make(chan struct{}, 1),
	}
}

// selectorKey is a binding's selector, or the pod label that it matches, in a namespace.
type selectorKey struct{ namespace, selector string }

// key is the selectorKey under which a selector finds the labels that it can match.
func (o *objects) key(namespace, selector string) selectorKey {
	if o.acrossNamespaces {
		namespace = ""
	}
	return selectorKey{namespace, selector}
}

func (o *objects) markLabelLocked(key selectorKey) {
	for _, pod := range o.podsByLabel[key] {
		o.dirty[pod.ObjectName] = struct{}{}
	}
}

// The …ChangedLocked functions update the indexes and mark the pods that a change affects.
// They are called for the old version of an object, which is no longer present, and then for
// the new one.

func (o *objects) podChangedLocked(pod *podInfo, present bool) {
	o.dirty[pod.ObjectName] = struct{}{}
	o.podsByLabel.set(o.key(pod.Namespace, pod.labels[aadpodidentity.BindingLabel]), pod, present)
}

func (o *objects) bindingChangedLocked(b *bindingInfo, present bool) {
	key := o.key(b.Namespace, b.selector)
	o.markLabelLocked(key)
	o.bindingsBySelector.set(key, b, present)
	o.bindingsByIdentity.set(cache.NewObjectName(b.Namespace, b.identity), b, present)
}

func (o *objects) identityChangedLocked(id *identityInfo, _ bool) {
	for _, b := range o.bindingsByIdentity[id.ObjectName] {
		o.markLabelLocked(o.key(b.Namespace, b.selector))
	}
	// An assignment stays after its binding until MIC has noticed, see fromAssignmentLocked.
	for _, a := range o.assignedByIdentity[id.ObjectName] {
		o.dirty[a.pod] = struct{}{}
	}
}

func (o *objects) exceptionChangedLocked(e *exceptionInfo, present bool) {
	o.exceptionsByNS.set(e.Namespace, e, present)
	for pod := range o.pods { // of this node: some hundreds at most
		if pod.Namespace == e.Namespace {
			o.dirty[pod] = struct{}{}
		}
	}
}

func (o *objects) assignmentChangedLocked(a *assignmentInfo, present bool) {
	o.dirty[a.pod] = struct{}{}
	o.assignedByPod.set(a.pod, a, present)
	o.assignedByIdentity.set(a.identity.ObjectName, a, present)
}

// multimap is an index: a key has several values.
type multimap[K comparable, V any] map[K][]*V

// set adds a value, or removes it.
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
