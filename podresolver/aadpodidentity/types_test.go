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

// decodeObject decodes a response body of the API server as a client does.
func decodeObject[T runtime.Object](t *testing.T, body string, into T) T {
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

// object is the JSON of an object with these fields beside its metadata.
func object(kind, fields string) string {
	return `{"apiVersion":"aadpodidentity.k8s.io/v1","kind":"` + kind + `","metadata":{"namespace":"shop","name":"n"},` + fields + `}`
}

func TestMalformedIdentitySpec(t *testing.T) {
	for _, spec := range []string{
		`{"type":{},"clientID":"c1"}`, `{"type":"0","clientID":"c1"}`, `{"type":1.5,"clientID":"c1"}`,
		`{"type":0,"clientID":["c1"]}`, `[]`, `"text"`, `7`, `{"replicas":"two","clientID":"c1"}`,
	} {
		got := decodeObject(t, object("AzureIdentity", `"spec":`+spec), &AzureIdentity{})
		assert.NotEmpty(t, got.Spec.Unreadable, spec)
		assert.Equal(t, AzureIdentitySpec{Unreadable: got.Spec.Unreadable}, got.Spec, "no field is used")
		assert.Equal(t, "n", got.Name)
	}
}

func TestMalformedSpecsGrantNothing(t *testing.T) {
	assert.Zero(t, decodeObject(t, object("AzureIdentityBinding", `"spec":{"selector":{},"azureIdentity":"i"}`), &AzureIdentityBinding{}).Spec)
	assert.Zero(t, decodeObject(t, object("AzurePodIdentityException", `"spec":{"podLabels":["app"]}`), &AzurePodIdentityException{}).Spec)
	assert.Zero(t, decodeObject(t, object("AzureAssignedIdentity", `"spec":{"pod":7,"nodename":"n"}`), &AzureAssignedIdentity{}).Spec)

	embedded := decodeObject(t, object("AzureAssignedIdentity",
		`"spec":{"pod":"p","azureIdentityRef":{"metadata":{"name":"i"},"spec":{"type":"odd"}}}`), &AzureAssignedIdentity{})
	assert.Equal(t, "p", embedded.Spec.Pod)
	assert.NotEmpty(t, embedded.Spec.AzureIdentityRef.Spec.Unreadable)
}

func TestMalformedStatus(t *testing.T) {
	for _, status := range []string{`"Assigned"`, `{"status":1}`, `{"status":{"a":1}}`} {
		got := decodeObject(t, object("AzureAssignedIdentity", `"spec":{"pod":"p"},"status":`+status), &AzureAssignedIdentity{})
		assert.Equal(t, "p", got.Spec.Pod)
		assert.NotContains(t, []string{"", Assigned, Created}, got.Status.Status, `"" means Assigned`)
	}
}

func TestMissingSpec(t *testing.T) {
	for _, body := range []string{`"spec":null`, `"spec":{}`, `"other":1`} {
		assert.Zero(t, decodeObject(t, object("AzureIdentity", body), &AzureIdentity{}).Spec, body)
		assert.Zero(t, decodeObject(t, object("AzureAssignedIdentity", body), &AzureAssignedIdentity{}).Spec, body)
	}
}

func TestFieldNamesAreCaseSensitive(t *testing.T) {
	got := decodeObject(t, object("AzureIdentity", `"spec":{"Type":2,"clientid":"a","ClientID":"b","resourceId":"c","clientpassword":{"name":"d"}},"Spec":{"clientID":"e"}`), &AzureIdentity{})
	assert.Zero(t, got.Spec)
	got = decodeObject(t, object("AzureIdentity", `"spec":{"clientID":"a","clientid":"b","clientPassword":{"name":"n","Name":"m"}}`), &AzureIdentity{})
	assert.Equal(t, AzureIdentitySpec{ClientID: "a", ClientPassword: SecretReference{Name: "n"}}, got.Spec)
	assert.Zero(t, decodeObject(t, object("AzureIdentityBinding", `"spec":{"AzureIdentity":"a","Selector":"b"}`), &AzureIdentityBinding{}).Spec)
	assert.Zero(t, decodeObject(t, object("AzurePodIdentityException", `"spec":{"PodLabels":{"a":"b"}}`), &AzurePodIdentityException{}).Spec)
	assigned := decodeObject(t, object("AzureAssignedIdentity", `"spec":{"nodeName":"a","azureidentityref":{}},"status":{"Status":"Created"}`), &AzureAssignedIdentity{})
	assert.Zero(t, assigned.Spec)
	assert.Zero(t, assigned.Status)
}

func TestRoundTrip(t *testing.T) {
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
	for _, in := range []runtime.Object{
		identity, binding,
		&AzureAssignedIdentity{TypeMeta: kind("AzureAssignedIdentity"), ObjectMeta: meta, Spec: AzureAssignedIdentitySpec{
			AzureIdentityRef: identity.DeepCopy(), AzureBindingRef: binding.DeepCopy(), Pod: "p", PodNamespace: "shop", NodeName: "node1", Replicas: &replicas,
		}, Status: AzureAssignedIdentityStatus{Status: Assigned}},
		&AzurePodIdentityException{TypeMeta: kind("AzurePodIdentityException"), ObjectMeta: meta, Spec: AzurePodIdentityExceptionSpec{
			PodLabels: map[string]string{"app": "x"},
		}},
	} {
		body, err := json.Marshal(in)
		require.NoError(t, err)
		empty, ok := reflect.New(reflect.TypeOf(in).Elem()).Interface().(runtime.Object)
		require.True(t, ok)
		out := decodeObject(t, string(body), empty)
		in.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{}) // a client's decoder clears it
		assert.Equal(t, in, out)
	}
}

func TestWatchEvent(t *testing.T) {
	got := decodeObject(t, `{"type":"ADDED","object":`+object("AzureIdentity", `"spec":{"clientID":"c"}`)+`}`, &metav1.WatchEvent{})
	assert.Equal(t, string(watch.Added), got.Type)
	assert.Equal(t, "c", decodeObject(t, string(got.Object.Raw), &AzureIdentity{}).Spec.ClientID)
}
