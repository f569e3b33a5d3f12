package podresolver

import (
	"context"
	stdjson "encoding/json"
	"fmt"
	"io"

	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/json"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// listing lists one of the custom resources as a stream: object after object becomes
// a row as it comes in, and of its metadata only what is read here is decoded. A
// cluster has tens of thousands of them. A watch that begins with all objects would
// do with as little memory, but it is not compressed, fifteen times the bytes, and
// apimachinery goes over each byte ten times.
type listing struct{ *cache.ListWatch }

// IsWatchListSemanticsUnSupported makes a reflector list before it watches.
func (listing) IsWatchListSemanticsUnSupported() bool { return true }

// decodeInto is where the parts of an item of a list are decoded into.
type decodeInto struct {
	meta         *metav1.ObjectMeta
	spec, status any // pointers; a nil status is ignored
}

// newListing returns what lists objects T as rows R, and watches them. parts are those of T.
func newListing[T, R any](client *rest.RESTClient, resource schema.GroupVersionResource, kind, labels string, parts func(*T) decodeInto, parse func(*T) *R) cache.ListerWatcher {
	request := func(o metav1.ListOptions) *rest.Request {
		o.LabelSelector = labels
		return client.Get().Resource(resource.Resource).VersionedParams(&o, metav1.ParameterCodec)
	}
	return listing{&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			body, err := request(o).Stream(ctx)
			if err != nil {
				return nil, err
			}
			defer body.Close()
			list, err := readList(body, kind+"List", parts, parse)
			if err != nil {
				return nil, fmt.Errorf("reading the list: %w", err)
			}
			return list, nil
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.Watch = true
			return request(o).Watch(ctx)
		},
	}}
}

// readList reads a list of that kind, in JSON, to its end. Anything else is an
// error: half a list is not to be mistaken for a whole one.
func readList[T, R any](body io.Reader, wantKind string, parts func(*T) decodeInto, parse func(*T) *R) (*metainternalversion.List, error) {
	list := &metainternalversion.List{}
	in := stdjson.NewDecoder(body)
	if err := expect(in, stdjson.Delim('{')); err != nil {
		return nil, err
	}
	var kind string
	var whole bool
	var ignored stdjson.RawMessage
	for in.More() {
		key, err := in.Token()
		if err != nil {
			return nil, err
		}
		switch key {
		case "kind":
			err = in.Decode(&kind)
		case "metadata":
			err = in.Decode(&list.ListMeta)
		case "items":
			list.Items, err = readItems(in, parts, parse)
			whole = true
		default:
			err = in.Decode(&ignored)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := expect(in, stdjson.Delim('}')); err != nil {
		return nil, err
	}
	if kind != wantKind || list.ResourceVersion == "" || !whole {
		return nil, fmt.Errorf("this is no %s but a %q of resource version %q, with items: %t", wantKind, kind, list.ResourceVersion, whole)
	}
	return list, nil
}

func readItems[T, R any](in *stdjson.Decoder, parts func(*T) decodeInto, parse func(*T) *R) (rows []runtime.Object, err error) {
	if err := expect(in, stdjson.Delim('[')); err != nil {
		return nil, err
	}
	var raw stdjson.RawMessage
	for in.More() {
		if err := in.Decode(&raw); err != nil {
			return nil, err
		}
		var object T
		to := parts(&object)
		var item struct {
			Metadata struct {
				Name              string      `json:"name"`
				Namespace         string      `json:"namespace"`
				CreationTimestamp metav1.Time `json:"creationTimestamp"`
				Annotations       struct {
					Behavior string `json:"aadpodidentity.k8s.io/Behavior"` // BehaviorAnnotation
				} `json:"annotations"`
			} `json:"metadata"`
			Spec   any `json:"spec"`
			Status any `json:"status"`
		}
		item.Spec, item.Status = to.spec, to.status
		if to.status == nil {
			item.Status = &struct{}{}
		}
		// Field names are case-sensitive, as everywhere in Kubernetes.
		if err := json.UnmarshalCaseSensitivePreserveInts(raw, &item); err != nil {
			return nil, err
		}
		*to.meta = metav1.ObjectMeta{Name: item.Metadata.Name, Namespace: item.Metadata.Namespace, CreationTimestamp: item.Metadata.CreationTimestamp}
		if b := item.Metadata.Annotations.Behavior; b != "" {
			to.meta.Annotations = map[string]string{aadpodidentity.BehaviorAnnotation: b}
		}
		rows = append(rows, &gathered{cache.MetaObjectToName(to.meta), parse(&object)})
	}
	return rows, expect(in, stdjson.Delim(']'))
}

func expect(in *stdjson.Decoder, want stdjson.Delim) error {
	got, err := in.Token()
	if err == nil && got != want {
		err = fmt.Errorf("%v where %v should be", got, want)
	}
	return err
}

// GetObjectKind implements runtime.Object, which whatever is in a list must be.
func (*gathered) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject implements runtime.Object. Rows never change.
func (g *gathered) DeepCopyObject() runtime.Object { return g }
