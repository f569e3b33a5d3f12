package podresolver

import (
	"context"
	stdjson "encoding/json"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/json"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// listStream lists a custom resource as a stream: each object is decoded and trimmed as it
// arrives, and of its metadata only the fields that are needed are decoded, because a cluster
// has tens of thousands of objects. A streaming list (WatchList) would need as little memory,
// but API servers before 1.37 do not compress it, which makes it fifteen times as large, and
// apimachinery scans each byte ten times.
type listStream struct{ *cache.ListWatch }

// IsWatchListSemanticsUnSupported makes a reflector list before it watches.
func (listStream) IsWatchListSemanticsUnSupported() bool { return true }

// decodeTargets are the parts of an object to decode into.
type decodeTargets struct {
	meta         *metav1.ObjectMeta
	spec, status any // pointers; nil is skipped
}

// newListStream returns a ListerWatcher of objects T, which its lists trim to Info.
func newListStream[T, Info any](client *rest.RESTClient, resource schema.GroupVersionResource, kind, labels string, targets func(*T) decodeTargets, trim func(*T) *Info) cache.ListerWatcher {
	return listStreamOf(kind, targets, trim, func(o metav1.ListOptions, _ string) *rest.Request {
		o.LabelSelector = labels
		return client.Get().Resource(resource.Resource).VersionedParams(&o, metav1.ParameterCodec)
	})
}

// newMetadataStream is newListStream for the metadata of objects, whose rest the API server does
// not send (kubernetes.io, "Kubernetes API Concepts", Metadata-only fetches).
func newMetadataStream[Info any](client *rest.RESTClient, resource schema.GroupVersionResource, trim func(*metav1.PartialObjectMetadata) *Info) cache.ListerWatcher {
	targets := func(o *metav1.PartialObjectMetadata) decodeTargets { return decodeTargets{meta: &o.ObjectMeta} }
	return listStreamOf("PartialObjectMetadata", targets, trim, func(o metav1.ListOptions, kind string) *rest.Request {
		return client.Get().Resource(resource.Resource).VersionedParams(&o, metav1.ParameterCodec).
			SetHeader("Accept", "application/json;as="+kind+";g=meta.k8s.io;v=v1")
	})
}

// addMetadata adds the types that a client for newMetadataStream needs.
func addMetadata(scheme *runtime.Scheme) error {
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion) // Status
	return metav1.AddMetaToScheme(scheme)
}

// listStreamOf returns a listStream for requests, which are for an object or list of that kind.
func listStreamOf[T, Info any](kind string, targets func(*T) decodeTargets, trim func(*T) *Info, request func(o metav1.ListOptions, kind string) *rest.Request) cache.ListerWatcher {
	return listStream{&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			body, err := request(o, kind+"List").Stream(ctx)
			if err != nil {
				return nil, err
			}
			defer body.Close()
			list, err := decodeList(body, kind+"List", targets, trim)
			if err != nil {
				return nil, fmt.Errorf("decoding the list: %w", err)
			}
			return list, nil
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.Watch = true
			return request(o, kind).Watch(ctx)
		},
	}}
}

// decodeList decodes a complete JSON list of that kind. A truncated list is an error: it must
// not be mistaken for a complete one.
func decodeList[T, Info any](body io.Reader, wantKind string, targets func(*T) decodeTargets, trim func(*T) *Info) (*metainternalversion.List, error) {
	list := &metainternalversion.List{}
	in := stdjson.NewDecoder(body)
	if err := expect(in, stdjson.Delim('{')); err != nil {
		return nil, err
	}
	var kind string
	var hasItems bool
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
			list.Items, err = decodeItems(in, targets, trim)
			hasItems = true
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
	if kind != wantKind || list.ResourceVersion == "" || !hasItems {
		return nil, fmt.Errorf("want a %s with a resource version and items; got kind %q, resource version %q, items: %t", wantKind, kind, list.ResourceVersion, hasItems)
	}
	return list, nil
}

// decodeItems decodes each item by itself, so that its depth counts from its own beginning: a
// decoder of the whole list would refuse all of it for one object of the greatest depth that the
// API server takes.
func decodeItems[T, Info any](in *stdjson.Decoder, targets func(*T) decodeTargets, trim func(*T) *Info) (items []runtime.Object, err error) {
	if err := expect(in, stdjson.Delim('[')); err != nil {
		return nil, err
	}
	var raw stdjson.RawMessage
	for in.More() {
		if err := in.Decode(&raw); err != nil {
			return nil, err
		}
		var object T
		to := targets(&object)
		var item struct {
			Metadata struct {
				Name              string      `json:"name"`
				Namespace         string      `json:"namespace"`
				UID               types.UID   `json:"uid"`
				CreationTimestamp metav1.Time `json:"creationTimestamp"`
				Annotations       annotations `json:"annotations"`
			} `json:"metadata"`
			Spec   any `json:"spec"`
			Status any `json:"status"`
		}
		item.Spec, item.Status = to.spec, to.status
		if to.spec == nil {
			item.Spec = &struct{}{}
		}
		if to.status == nil {
			item.Status = &struct{}{}
		}
		// Field names are case-sensitive, as everywhere in Kubernetes.
		if err := json.UnmarshalCaseSensitivePreserveInts(raw, &item); err != nil {
			return nil, err
		}
		*to.meta = metav1.ObjectMeta{
			Name: item.Metadata.Name, Namespace: item.Metadata.Namespace, UID: item.Metadata.UID,
			CreationTimestamp: item.Metadata.CreationTimestamp, Annotations: item.Metadata.Annotations.nonEmpty(),
		}
		items = append(items, &listItem{cache.MetaObjectToName(to.meta), trim(&object)})
	}
	return items, expect(in, stdjson.Delim(']'))
}

// annotations are those that decisions need.
type annotations struct {
	Behavior            string `json:"aadpodidentity.k8s.io/Behavior"`
	Federated           string `json:"aadpodidentity.k8s.io/Federated"`
	ClientID            string `json:"azure.workload.identity/client-id"`
	TenantID            string `json:"azure.workload.identity/tenant-id"`
	AdditionalClientIDs string `json:"aadpodidentity.k8s.io/additional-client-ids"`
}

// nonEmpty returns those that are set, nil if none is.
func (a annotations) nonEmpty() map[string]string {
	var set map[string]string
	for key, value := range map[string]string{
		aadpodidentity.BehaviorAnnotation: a.Behavior, aadpodidentity.FederatedAnnotation: a.Federated,
		ClientIDAnnotation: a.ClientID, TenantIDAnnotation: a.TenantID, AdditionalClientIDsAnnotation: a.AdditionalClientIDs,
	} {
		if value == "" {
			continue
		}
		if set == nil {
			set = make(map[string]string)
		}
		set[key] = value
	}
	return set
}

func expect(in *stdjson.Decoder, want stdjson.Delim) error {
	got, err := in.Token()
	if err == nil && got != want {
		err = fmt.Errorf("unexpected %v, want %v", got, want)
	}
	return err
}
