package podresolver

import (
	"reflect"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"
)

// reflectorStore is what a reflector keeps up to date: it trims each object, and updates one
// kind of objects.
type reflectorStore[Info any] struct {
	objects  *objects
	infos    map[cache.ObjectName]*Info
	trim     func(object any) *Info // nil for an object that is not kept
	changed  func(info *Info, present bool)
	observed func(list bool) // called for whatever the API server sends, with true for a complete list
}

var _ cache.TransformingStore = (*reflectorStore[podInfo])(nil)

// setLocked replaces an object, or removes it if info is nil. An equal one changes nothing.
func (s *reflectorStore[Info]) setLocked(name cache.ObjectName, info *Info) {
	before := s.infos[name]
	switch {
	case info == nil && before == nil, info != nil && before != nil && reflect.DeepEqual(*info, *before):
		return
	case info == nil:
		delete(s.infos, name)
	default:
		s.infos[name] = info
	}
	if before != nil {
		s.changed(before, false)
	}
	if info != nil {
		s.changed(info, true)
	}
}

// update makes a change under the lock, and wakes the deciding goroutine if it affects a pod.
func (s *reflectorStore[Info]) update(change func()) {
	s.objects.mu.Lock()
	change()
	dirty := len(s.objects.dirty) > 0
	s.objects.mu.Unlock()
	if dirty {
		select {
		case s.objects.wake <- struct{}{}:
		default:
		}
	}
}

// Add implements cache.ReflectorStore.
func (s *reflectorStore[Info]) Add(obj any) error { return s.Update(obj) }

// Update implements cache.ReflectorStore.
func (s *reflectorStore[Info]) Update(obj any) error {
	s.observed(false)
	name, err := objectName(obj)
	if err != nil {
		return err
	}
	info := s.trim(obj)
	s.update(func() { s.setLocked(name, info) })
	return nil
}

// Delete implements cache.ReflectorStore. obj may be a tombstone.
func (s *reflectorStore[Info]) Delete(obj any) error {
	s.observed(false)
	name, err := objectName(obj)
	if err != nil {
		return err
	}
	s.update(func() { s.setLocked(name, nil) })
	return nil
}

// Replace implements cache.ReflectorStore. Objects that are equal to the listed ones are left
// alone.
func (s *reflectorStore[Info]) Replace(list []any, _ string) error {
	listed := make(map[cache.ObjectName]*Info, len(list))
	for _, obj := range list {
		name, err := objectName(obj)
		if err != nil {
			return err
		}
		listed[name] = s.trim(obj)
	}
	s.update(func() {
		for name := range s.infos {
			if listed[name] == nil {
				s.setLocked(name, nil)
			}
		}
		for name, info := range listed {
			s.setLocked(name, info)
		}
	})
	s.observed(true)
	return nil
}

// Resync implements cache.ReflectorStore. Nobody needs one.
func (s *reflectorStore[Info]) Resync() error { return nil }

// Bookmark implements cache.ReflectorBookmarkStore: the API server responds, and nothing has
// changed.
func (s *reflectorStore[Info]) Bookmark(string) error { s.observed(false); return nil }

// Transformer implements cache.TransformingStore: a reflector that collects a list keeps
// trimmed objects instead of whole ones.
func (s *reflectorStore[Info]) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		name, err := objectName(obj)
		if err != nil {
			return nil, err
		}
		return &listItem{name, s.trim(obj)}, nil
	}
}

// listItem is a trimmed object of a list. It does not change.
type listItem struct {
	cache.ObjectName
	info any // a pointer to one of the infos; nil for an object that is not kept
}

// GetObjectKind implements runtime.Object, which an item of a list must be.
func (*listItem) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject implements runtime.Object.
func (i *listItem) DeepCopyObject() runtime.Object { return i }

func objectName(obj any) (cache.ObjectName, error) {
	if item, ok := obj.(*listItem); ok {
		return item.ObjectName, nil
	}
	return cache.DeletionHandlingObjectToName(obj)
}

// trimAny adapts a function that trims a T to what a reflector passes.
func trimAny[T, Info any](trim func(*T) *Info) func(any) *Info {
	return func(obj any) *Info {
		switch obj := obj.(type) {
		case *T:
			return trim(obj)
		case *listItem:
			info, _ := obj.info.(*Info)
			return info
		}
		return nil
	}
}
