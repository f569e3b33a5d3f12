package aadpodidentity

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
)

// decode is what a client does with an answer of the API server.
func decode[T runtime.Object](t *testing.T, body string, into T) T {
	t.Helper()
	scheme := runtime.NewScheme()
	require.NoError(t, AddToScheme(scheme))
	codecs := serializer.NewCodecFactory(scheme).WithoutConversion()
	info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), runtime.ContentTypeJSON)
	require.True(t, ok)
	object, _, err := codecs.DecoderToVersion(info.Serializer, GroupVersion).Decode([]byte(body), nil, into)
	require.NoError(t, err)
	got, ok := object.(T)
	require.True(t, ok, "%T", object)
	return got
}

func one(kind, rest string) string {
	return `{"apiVersion":"aadpodidentity.k8s.io/v1","kind":"` + kind + `","metadata":{"namespace":"shop","name":"n"},` + rest + `}`
}

func listOf(kind string, items ...string) string {
	list := `{"apiVersion":"aadpodidentity.k8s.io/v1","kind":"` + kind + `List","metadata":{"resourceVersion":"7"},"items":[`
	for i, item := range items {
		if i > 0 {
			list += ","
		}
		list += one(kind, item)
	}
	return list + "]}"
}

func TestAnObjectThatDoesNotFitDoesNotSpoilTheList(t *testing.T) {
	for _, odd := range []string{
		`"spec":{"type":{},"clientID":"c1"}`, `"spec":{"type":"0","clientID":"c1"}`, `"spec":{"type":1.5,"clientID":"c1"}`,
		`"spec":{"type":0,"clientID":["c1"]}`, `"spec":[]`, `"spec":"text"`, `"spec":7`, `"spec":{"replicas":"two","clientID":"c1"}`,
	} {
		got := decode(t, listOf("AzureIdentity", `"spec":{"type":1,"clientID":"before"}`, odd, `"spec":{"type":2,"clientID":"after"}`), &AzureIdentityList{})
		require.Len(t, got.Items, 3, odd)
		assert.Equal(t, "7", got.ResourceVersion)
		assert.Equal(t, AzureIdentitySpec{Type: 1, ClientID: "before"}, got.Items[0].Spec)
		assert.Equal(t, AzureIdentitySpec{Type: 2, ClientID: "after"}, got.Items[2].Spec)
		why := got.Items[1].Spec.Unreadable
		assert.NotEmpty(t, why, odd)
		assert.Equal(t, AzureIdentitySpec{Unreadable: why}, got.Items[1].Spec, "nothing of it is believed")
		assert.Equal(t, "n", got.Items[1].Name)
	}

	bindings := decode(t, listOf("AzureIdentityBinding", `"spec":{"selector":{},"azureIdentity":"i"}`, `"spec":{"selector":"x"}`), &AzureIdentityBindingList{})
	require.Len(t, bindings.Items, 2)
	assert.Zero(t, bindings.Items[0].Spec, "it matches nothing")
	assert.Equal(t, "x", bindings.Items[1].Spec.Selector)

	exceptions := decode(t, listOf("AzurePodIdentityException", `"spec":{"podLabels":["app"]}`, `"spec":{"podLabels":{"app":"x"}}`), &AzurePodIdentityExceptionList{})
	require.Len(t, exceptions.Items, 2)
	assert.Zero(t, exceptions.Items[0].Spec, "it excepts nobody")
	assert.Equal(t, map[string]string{"app": "x"}, exceptions.Items[1].Spec.PodLabels)

	assigned := decode(t, listOf("AzureAssignedIdentity", `"spec":{"pod":7,"nodename":"n"}`, `"spec":{"pod":"p"}`), &AzureAssignedIdentityList{})
	require.Len(t, assigned.Items, 2)
	assert.Zero(t, assigned.Items[0].Spec)
	assert.Equal(t, "p", assigned.Items[1].Spec.Pod)
}

func TestAnIdentityInAnAssignmentMayNotFitEither(t *testing.T) {
	got := decode(t, listOf("AzureAssignedIdentity",
		`"spec":{"pod":"p","azureIdentityRef":{"metadata":{"name":"i"},"spec":{"type":"odd"}}}`, `"spec":{"pod":"q"}`), &AzureAssignedIdentityList{})
	require.Len(t, got.Items, 2)
	assert.Equal(t, "p", got.Items[0].Spec.Pod)
	assert.NotEmpty(t, got.Items[0].Spec.AzureIdentityRef.Spec.Unreadable)
}

// TestAStatusThatDoesNotFitDoesNotSpoilTheList, nor what is beside a spec.
func TestAStatusThatDoesNotFitDoesNotSpoilTheList(t *testing.T) {
	for _, odd := range []string{`"status":"Assigned"`, `"status":{"status":1}`, `"status":{"status":{"a":1}}`} {
		t.Run(odd, func(t *testing.T) {
			got := decode(t, listOf("AzureAssignedIdentity", odd, `"spec":{"pod":"p"}`), &AzureAssignedIdentityList{})
			require.Len(t, got.Items, 2)
			assert.NotContains(t, []string{"", Assigned, Created}, got.Items[0].Status.Status, `"" means Assigned`)
		})
	}
}

func TestWhatIsLeftOutIsEmpty(t *testing.T) {
	for _, body := range []string{`"spec":null`, `"spec":{}`, `"other":1`} {
		assert.Zero(t, decode(t, one("AzureIdentity", body), &AzureIdentity{}).Spec, body)
		assert.Zero(t, decode(t, one("AzureAssignedIdentity", body), &AzureAssignedIdentity{}).Spec, body)
	}
}

func TestFieldNamesAreCaseSensitive(t *testing.T) {
	got := decode(t, one("AzureIdentity", `"spec":{"Type":2,"clientid":"a","ClientID":"b","resourceId":"c","clientpassword":{"name":"d"}},"Spec":{"clientID":"e"}`), &AzureIdentity{})
	assert.Zero(t, got.Spec)
	got = decode(t, one("AzureIdentity", `"spec":{"clientID":"a","clientid":"b","clientPassword":{"name":"n","Name":"m"}}`), &AzureIdentity{})
	assert.Equal(t, AzureIdentitySpec{ClientID: "a", ClientPassword: SecretReference{Name: "n"}}, got.Spec)
	assert.Zero(t, decode(t, one("AzureIdentityBinding", `"spec":{"AzureIdentity":"a","Selector":"b"}`), &AzureIdentityBinding{}).Spec)
	assert.Zero(t, decode(t, one("AzurePodIdentityException", `"spec":{"PodLabels":{"a":"b"}}`), &AzurePodIdentityException{}).Spec)
	assigned := decode(t, one("AzureAssignedIdentity", `"spec":{"nodeName":"a","azureidentityref":{}},"status":{"Status":"Created"}`), &AzureAssignedIdentity{})
	assert.Zero(t, assigned.Spec)
	assert.Zero(t, assigned.Status)
}

func full() []runtime.Object {
	replicas := int32(2)
	meta := metav1.ObjectMeta{
		Namespace: "shop", Name: "n", Labels: map[string]string{NodeNameLabel: "node1"}, CreationTimestamp: metav1.NewTime(time.Unix(1_700_000_000, 0)),
		Annotations: map[string]string{BehaviorAnnotation: BehaviorNamespaced},
	}
	kind := func(kind string) metav1.TypeMeta {
		return metav1.TypeMeta{APIVersion: GroupVersion.String(), Kind: kind}
	}
	identity := &AzureIdentity{TypeMeta: kind("AzureIdentity"), ObjectMeta: meta, Spec: AzureIdentitySpec{
		Type: ServicePrincipal, ResourceID: "/r/1", ClientID: "c1", ClientPassword: SecretReference{Name: "s", Namespace: "vault"},
		TenantID: "t", AuxiliaryTenantIDs: []string{"u", "v"}, ADResourceID: "ar", ADEndpoint: "https://ad", Replicas: &replicas,
	}}
	binding := &AzureIdentityBinding{TypeMeta: kind("AzureIdentityBinding"), ObjectMeta: meta, Spec: AzureIdentityBindingSpec{
		AzureIdentity: "n", Selector: "x", Weight: 3,
	}}
	return []runtime.Object{
		identity, binding,
		&AzureAssignedIdentity{TypeMeta: kind("AzureAssignedIdentity"), ObjectMeta: meta, Spec: AzureAssignedIdentitySpec{
			AzureIdentityRef: identity.deepCopy(), AzureBindingRef: binding.deepCopy(), Pod: "p", PodNamespace: "shop", NodeName: "node1", Replicas: &replicas,
		}, Status: AzureAssignedIdentityStatus{Status: Assigned}},
		&AzurePodIdentityException{TypeMeta: kind("AzurePodIdentityException"), ObjectMeta: meta, Spec: AzurePodIdentityExceptionSpec{
			PodLabels: map[string]string{"app": "x"},
		}},
	}
}

func TestWhatIsWrittenIsReadTheSame(t *testing.T) {
	for _, in := range full() {
		body, err := json.Marshal(in)
		require.NoError(t, err)
		empty, ok := reflect.New(reflect.TypeOf(in).Elem()).Interface().(runtime.Object)
		require.True(t, ok)
		out := decode(t, string(body), empty)
		in.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{}) // a client's decoder leaves it out
		assert.Equal(t, in, out)
	}
}

func TestEventsAreDecodedToo(t *testing.T) {
	got := decode(t, `{"type":"ADDED","object":`+one("AzureIdentity", `"spec":{"clientID":"c"}`)+`}`, &metav1.WatchEvent{})
	assert.Equal(t, string(watch.Added), got.Type)
	assert.Equal(t, "c", decode(t, string(got.Object.Raw), &AzureIdentity{}).Spec.ClientID)
}
