package podresolver

import (
	stdjson "encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

const completeList = `{"apiVersion":"aadpodidentity.k8s.io/v1","items":[
{"apiVersion":"aadpodidentity.k8s.io/v1","kind":"AzureIdentity","metadata":{"annotations":{"aadpodidentity.k8s.io/Behavior":"namespaced","aadpodidentity.k8s.io/Federated":"true","other":"{\"a\":[1]}"},
"creationTimestamp":"2026-11-21T08:48:04Z","labels":{"app":"a"},"managedFields":[{"fieldsV1":{"f:spec":{".":{}}}}],"name":"a","namespace":"shop","resourceVersion":"3","uid":"u"},
"spec":{"clientID":"C1","resourceID":"/R","type":0},"status":{"availableReplicas":1}},
{"metadata":{"name":"b","namespace":"shop","creationTimestamp":null},"spec":{"type":"none"}},
{"metadata":{"name":"c","namespace":"shop"},"spec":{"type":1,"clientid":"not the name of a field"},"Spec":{"clientID":"nor this"}}
],"kind":"AzureIdentityList","metadata":{"continue":"more","resourceVersion":"7"}}`

func read(text string) ([]*listItem, string, error) {
	list, err := decodeList(strings.NewReader(text), "AzureIdentityList", identityTargets, newIdentityInfo)
	if err != nil {
		return nil, "", err
	}
	var rows []*listItem
	for _, item := range list.Items {
		rows = append(rows, item.(*listItem))
	}
	return rows, list.ResourceVersion + list.Continue, nil
}

// TestDecodeMetadata: the API server sends the metadata of service accounts alone.
func TestDecodeMetadata(t *testing.T) {
	const one, two = "fed00000-0000-4000-8000-00000000000a", "fed00000-0000-4000-8000-00000000000b"
	text := `{"kind":"PartialObjectMetadataList","apiVersion":"meta.k8s.io/v1","metadata":{"resourceVersion":"9"},"items":[
{"metadata":{"name":"cart","namespace":"shop","uid":"u1","resourceVersion":"3","labels":{"a":"b"},"managedFields":[{"manager":"m"}],
"annotations":{"azure.workload.identity/client-id":"` + strings.ToUpper(one) + `","azure.workload.identity/tenant-id":"t","aadpodidentity.k8s.io/additional-client-ids":"` + two + `, c3","other":"x"}}},
{"metadata":{"name":"default","namespace":"shop","uid":"u2"}}]}`
	targets := func(o *metav1.PartialObjectMetadata) decodeTargets { return decodeTargets{meta: &o.ObjectMeta} }
	list, err := decodeList(strings.NewReader(text), "PartialObjectMetadataList", targets, newAccountInfo)
	require.NoError(t, err)
	require.Len(t, list.Items, 2)
	assert.Equal(t, &listItem{cache.NewObjectName("shop", "cart"), &accountInfo{
		ObjectName: cache.NewObjectName("shop", "cart"), uid: "u1",
		annotations: &accountAnnotations{clientID: one, tenantID: "t", additional: []string{two}, malformed: "c3", malformedCount: 1},
	}}, list.Items[0])
	assert.Equal(t, &listItem{cache.NewObjectName("shop", "default"), &accountInfo{ObjectName: cache.NewObjectName("shop", "default"), uid: "u2"}}, list.Items[1])
}

// TestDecodeList compares with encoding/json.
func TestDecodeList(t *testing.T) {
	rows, version, err := read(completeList)
	require.NoError(t, err)
	assert.Equal(t, "7more", version)
	var list struct {
		Items []aadpodidentity.AzureIdentity `json:"items"`
	}
	// Without the last item, because encoding/json matches field names case-insensitively.
	text := completeList[:strings.Index(completeList, ",\n{\"metadata\":{\"name\":\"c\"")] + "]}"
	require.NoError(t, stdjson.Unmarshal([]byte(text), &list))
	require.Len(t, rows, 3)
	for i := range list.Items {
		assert.Equal(t, &listItem{cache.MetaObjectToName(&list.Items[i]), newIdentityInfo(&list.Items[i])}, rows[i])
	}
	assert.Equal(t, &identityInfo{
		ObjectName: cache.NewObjectName("shop", "c"), kind: aadpodidentity.ServicePrincipal,
		principal: &Principal{Authority: defaultAuthority, SecretNamespace: "shop"},
	}, rows[2].info)

	// In any order, and empty.
	rows, version, err = read(`{"kind":"AzureIdentityList","metadata":{"resourceVersion":"7"},"more":{"items":[1]},"items":[]}`)
	require.NoError(t, err)
	assert.Equal(t, "7", version)
	assert.Empty(t, rows)
}

func TestTruncatedList(t *testing.T) {
	for i := range len(completeList) {
		_, _, err := read(completeList[:i])
		require.Error(t, err, completeList[:i])
	}
	for _, other := range []string{
		`{"kind":"Status","metadata":{},"status":"Failure"}`,
		`{"kind":"AzureIdentityBindingList","metadata":{"resourceVersion":"7"},"items":[]}`,
		`{"kind":"AzureIdentityList","metadata":{},"items":[]}`,
		`{"kind":"AzureIdentityList","metadata":{"resourceVersion":"7"}}`,
		`{"kind":"AzureIdentityList","metadata":{"resourceVersion":"7"},"items":{}}`,
		`[]`, `null`,
	} {
		_, _, err := read(other)
		assert.Error(t, err, other)
	}
}

// FuzzDecodeList: the result is a complete list or an error.
func FuzzDecodeList(f *testing.F) {
	f.Add(completeList)
	f.Add(`{"kind":"AzureIdentityList","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"annotations":null},"spec":null}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		rows, version, err := read(text)
		if err == nil && (version == "" || !stdjson.Valid([]byte(text)) && strings.Count(text, "}") == 0) {
			t.Fatalf("%q was read as %d rows", text, len(rows))
		}
	})
}

// The API server takes objects that are as deep as its decoder allows, and stores them whole where
// a definition keeps unknown fields.
func TestDeepObject(t *testing.T) {
	deep := strings.Repeat("[", 9999) + strings.Repeat("]", 9999)
	rows, _, err := read(`{"kind":"AzureIdentityList","metadata":{"resourceVersion":"7"},"items":[
{"metadata":{"name":"a","namespace":"shop"},"x":` + deep + `,"spec":{"clientID":"C1"}},{"metadata":{"name":"b","namespace":"shop"},"spec":{}}]}`)
	require.NoError(t, err)
	assert.Len(t, rows, 2)
}
