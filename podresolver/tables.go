package podresolver

import (
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// ref is what an object is called; also a value in a namespace, where an index asks
// for that.
type ref struct{ namespace, name string }

// The rows hold what a decision needs of an object, and no more: a cluster has tens
// of thousands of them. They never change once they are in a table.
type (
	podRow struct {
		ref
		uid         string
		created     time.Time
		started     time.Time // see Pod.Started
		until       time.Time // see claim
		labels      map[string]string
		addrs       []netip.Addr // of its status
		void        string       // why it holds none of addrs; "" if it holds them
		mic         bool         // it is MIC's own, see micPod
		hostNetwork bool
		// workloadIdentity is why its SDKs do not ask IMDS; "" if they do.
		workloadIdentity string
	}
	identityRow struct {
		ref
		kind                 aadpodidentity.IdentityType
		clientID, resourceID string     // lower case
		namespaced           bool       // by its annotation
		unreadable           string     // see aadpodidentity
		principal            *Principal // nil for a managed identity
	}
	bindingRow struct {
		ref
		identity, selector string
		created            int64 // Unix time
	}
	exceptionRow struct {
		ref
		labels map[string]string
	}
	assignedRow struct {
		ref
		pod      ref
		binding  bindingRow // as it was when MIC made the assignment
		identity identityRow
		ready    bool // its state says that the identity is on the node
		coming   bool // its state says that it will be
	}
)

// tables are the objects, indexed by what decisions ask for, and the pods for
// which a decision must be taken anew.
type tables struct {
	mu sync.Mutex // guards all of them

	pods       map[ref]*podRow
	identities map[ref]*identityRow
	bindings   map[ref]*bindingRow
	exceptions map[ref]*exceptionRow
	assigned   map[ref]*assignedRow

	podsByLabel        map[ref]map[ref]struct{} // by the value of BindingLabel, see key
	bindingsBySelector map[ref][]*bindingRow    // see key
	bindingsByIdentity map[ref][]*bindingRow
	exceptionsByNS     map[string][]*exceptionRow
	assignedByPod      map[ref][]*assignedRow

	acrossNamespaces bool // bindings match pods of other namespaces

	dirty map[ref]struct{} // pods
	wake  chan struct{}    // of capacity 1: something is dirty
}

func newTables(acrossNamespaces bool) *tables {
	return &tables{
		pods:               make(map[ref]*podRow),
		identities:         make(map[ref]*identityRow),
		bindings:           make(map[ref]*bindingRow),
		exceptions:         make(map[ref]*exceptionRow),
		assigned:           make(map[ref]*assignedRow),
		podsByLabel:        make(map[ref]map[ref]struct{}),
		bindingsBySelector: make(map[ref][]*bindingRow),
		bindingsByIdentity: make(map[ref][]*bindingRow),
		exceptionsByNS:     make(map[string][]*exceptionRow),
		assignedByPod:      make(map[ref][]*assignedRow),
		acrossNamespaces:   acrossNamespaces,
		dirty:              make(map[ref]struct{}),
		wake:               make(chan struct{}, 1),
	}
}

// key is where a selector meets the labels that it can match.
func (t *tables) key(namespace, selector string) ref {
	if t.acrossNamespaces {
		namespace = ""
	}
	return ref{namespace, selector}
}

func (t *tables) markPod(pod ref) { t.dirty[pod] = struct{}{} }

func (t *tables) markLabel(key ref) {
	for pod := range t.podsByLabel[key] {
		t.markPod(pod)
	}
}

// The changed… functions keep the indexes and mark the pods that a change of one
// row bears on. before is nil for a new row, after for one that is gone.

func (t *tables) changedPod(before, after *podRow) {
	if before != nil {
		t.markPod(before.ref)
		key := t.key(before.namespace, before.labels[aadpodidentity.BindingLabel])
		if delete(t.podsByLabel[key], before.ref); len(t.podsByLabel[key]) == 0 {
			delete(t.podsByLabel, key)
		}
	}
	if after != nil {
		t.markPod(after.ref)
		key := t.key(after.namespace, after.labels[aadpodidentity.BindingLabel])
		if t.podsByLabel[key] == nil {
			t.podsByLabel[key] = make(map[ref]struct{})
		}
		t.podsByLabel[key][after.ref] = struct{}{}
	}
}

func (t *tables) changedBinding(before, after *bindingRow) {
	if before != nil {
		key := t.key(before.namespace, before.selector)
		t.markLabel(key)
		without(t.bindingsBySelector, key, before)
		without(t.bindingsByIdentity, ref{before.namespace, before.identity}, before)
	}
	if after != nil {
		key := t.key(after.namespace, after.selector)
		t.markLabel(key)
		t.bindingsBySelector[key] = append(t.bindingsBySelector[key], after)
		identity := ref{after.namespace, after.identity}
		t.bindingsByIdentity[identity] = append(t.bindingsByIdentity[identity], after)
	}
}

func (t *tables) changedIdentity(before, after *identityRow) {
	row := after
	if row == nil {
		row = before
	}
	for _, b := range t.bindingsByIdentity[row.ref] {
		t.markLabel(t.key(b.namespace, b.selector))
	}
}

func (t *tables) changedException(before, after *exceptionRow) {
	namespace := ""
	if before != nil {
		namespace = before.namespace
		without(t.exceptionsByNS, namespace, before)
	}
	if after != nil {
		namespace = after.namespace
		t.exceptionsByNS[namespace] = append(t.exceptionsByNS[namespace], after)
	}
	for pod := range t.pods { // this node's: some hundreds at most
		if pod.namespace == namespace {
			t.markPod(pod)
		}
	}
}

func (t *tables) changedAssigned(before, after *assignedRow) {
	if before != nil {
		t.markPod(before.pod)
		without(t.assignedByPod, before.pod, before)
	}
	if after != nil {
		t.markPod(after.pod)
		t.assignedByPod[after.pod] = append(t.assignedByPod[after.pod], after)
	}
}

// without removes a row from a list in an index.
func without[K comparable, R any](index map[K][]*R, key K, row *R) {
	rest := slices.DeleteFunc(index[key], func(r *R) bool { return r == row })
	if len(rest) == 0 {
		delete(index, key)
		return
	}
	index[key] = rest
}

// table is one kind of rows as a store for a reflector to fill.
type table[R any] struct {
	tables  *tables
	rows    map[ref]*R
	parse   func(object any) *R // nil for what is not of this table
	changed func(before, after *R)
	heard   func(synced bool) // called for whatever the API server sends; synced with a whole list
}

var _ cache.TransformingStore = (*table[podRow])(nil)

// set puts a row in its place, or takes it away if it is nil. A row that is the
// same as before changes nothing.
func (t *table[R]) set(key ref, row *R) {
	before := t.rows[key]
	switch {
	case row == nil && before == nil, row != nil && before != nil && reflect.DeepEqual(*row, *before):
		return
	case row == nil:
		delete(t.rows, key)
	default:
		t.rows[key] = row
	}
	t.changed(before, row)
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
	fresh := make(map[ref]*R, len(list))
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
	ref
	row any
}

func keyOf(obj any) (ref, bool) {
	switch obj := obj.(type) {
	case *gathered:
		return obj.ref, true
	case cache.DeletedFinalStateUnknown:
		namespace, name, err := cache.SplitMetaNamespaceKey(obj.Key)
		return ref{namespace, name}, err == nil
	case metav1.Object:
		return ref{obj.GetNamespace(), obj.GetName()}, true
	}
	return ref{}, false
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
