package podresolver

import (
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

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

// table is one kind of rows as a store for a reflector to fill.
type table[R any] struct {
	tables  *tables
	rows    map[cache.ObjectName]*R
	parse   func(object any) *R // nil for what is not of this table
	changed func(row *R, present bool)
	heard   func(synced bool) // called for whatever the API server sends; synced with a whole list
}

var _ cache.TransformingStore = (*table[podRow])(nil)

// set puts a row in its place, or takes it away if it is nil. A row that is the
// same as before changes nothing.
func (t *table[R]) set(key cache.ObjectName, row *R) {
	before := t.rows[key]
	switch {
	case row == nil && before == nil, row != nil && before != nil && reflect.DeepEqual(*row, *before):
		return
	case row == nil:
		delete(t.rows, key)
	default:
		t.rows[key] = row
	}
	if before != nil {
		t.changed(before, false)
	}
	if row != nil {
		t.changed(row, true)
	}
}

func (t *table[R]) update(change func()) error {
	t.tables.mu.Lock()
	change()
	dirty := len(t.tables.dirty) > 0
	t.tables.mu.Unlock()
	if dirty {
		select {
		case t.tables.wake <- struct{}{}:
		default:
		}
	}
	return nil
}

// Add implements cache.ReflectorStore.
func (t *table[R]) Add(obj any) error { return t.Update(obj) }

// Update implements cache.ReflectorStore.
func (t *table[R]) Update(obj any) error {
	t.heard(false)
	key, ok := keyOf(obj)
	if !ok {
		return nil
	}
	row := t.parse(obj)
	return t.update(func() { t.set(key, row) })
}

// Delete implements cache.ReflectorStore. Of an object that went while nobody
// watched, only the key may be known.
func (t *table[R]) Delete(obj any) error {
	t.heard(false)
	key, ok := keyOf(obj)
	if !ok {
		return nil
	}
	return t.update(func() { t.set(key, nil) })
}

// Replace implements cache.ReflectorStore. What is as it was stays untouched.
func (t *table[R]) Replace(list []any, _ string) error {
	fresh := make(map[cache.ObjectName]*R, len(list))
	for _, obj := range list {
		if key, ok := keyOf(obj); ok {
			fresh[key] = t.parse(obj)
		}
	}
	err := t.update(func() {
		for key := range t.rows {
			if fresh[key] == nil {
				t.set(key, nil)
			}
		}
		for key, row := range fresh {
			t.set(key, row)
		}
	})
	t.heard(true)
	return err
}

// Resync implements cache.ReflectorStore. There is nothing to say again.
func (t *table[R]) Resync() error { return nil }

// Bookmark implements cache.ReflectorBookmarkStore: the API server says that it is
// there, and has nothing new.
func (t *table[R]) Bookmark(string) error { t.heard(false); return nil }

// Transformer implements cache.TransformingStore: while a reflector gathers a list,
// it keeps rows, and not whole objects.
func (t *table[R]) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		key, ok := keyOf(obj)
		if !ok {
			return obj, nil
		}
		return &gathered{key, t.parse(obj)}, nil
	}
}

// gathered is a row on its way from a list to its table.
type gathered struct {
	cache.ObjectName
	row any
}

func keyOf(obj any) (cache.ObjectName, bool) {
	if item, ok := obj.(*gathered); ok {
		return item.ObjectName, true
	}
	name, err := cache.DeletionHandlingObjectToName(obj)
	return name, err == nil
}

// rowOf makes a parse function out of one for a type.
func rowOf[T, R any](parse func(*T) *R) func(any) *R {
	return func(obj any) *R {
		switch obj := obj.(type) {
		case *T:
			return parse(obj)
		case *gathered:
			row, _ := obj.row.(*R)
			return row
		}
		return nil
	}
}
