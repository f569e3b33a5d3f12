package podresolver

import (
	"reflect"

	"k8s.io/client-go/tools/cache"
)

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
