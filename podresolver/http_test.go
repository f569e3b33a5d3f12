package podresolver_test

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// silentServer is an API server behind a broken proxy: after the first lists it accepts requests
// and sends nothing, or returns one error for all of them.
type silentServer struct {
	pods    []corev1.Pod
	failure atomic.Pointer[metav1.Status] // of all requests; nil for silence
	hanging atomic.Bool                   // lists do not return
	watches atomic.Int32
}

func (s *silentServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	query := r.URL.Query()
	if query.Get("sendInitialEvents") != "" {
		s.status(w, apierrors.NewInvalid(schema.GroupKind{}, "", nil).Status()) // it has no WatchList
		return
	}
	if failure := s.failure.Load(); failure != nil {
		s.status(w, *failure)
		return
	}
	if watch := query.Get("watch") != ""; watch || s.hanging.Load() {
		if watch {
			s.watches.Add(1)
		}
		w.(http.Flusher).Flush()
		for s.failure.Load() == nil {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(time.Millisecond):
			}
		}
		return
	}
	kinds := map[string]string{
		"pods": "PodList", "azureidentities": "AzureIdentityList", "azureidentitybindings": "AzureIdentityBindingList",
		"azurepodidentityexceptions": "AzurePodIdentityExceptionList",
	}
	resource := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	items := any([]any{})
	if resource == "pods" {
		items = s.pods
	}
	version := strings.TrimPrefix(strings.TrimPrefix(strings.TrimSuffix(r.URL.Path, "/"+resource), "/apis/"), "/api/")
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": kinds[resource], "apiVersion": version, "metadata": map[string]any{"resourceVersion": "1"}, "items": items})
}

func (*silentServer) status(w http.ResponseWriter, status metav1.Status) {
	status.Kind, status.APIVersion = "Status", "v1"
	w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(w).Encode(status)
}

// TestStaleOverHTTP is TestMaxStaleness with client-go's own client.
func TestStaleOverHTTP(t *testing.T) {
	gone := apierrors.NewGenericServerResponse(http.StatusGone, "list", schema.GroupResource{}, "", "too old", 0, false).Status()
	timeout := apierrors.NewTimeoutError("Too large resource version", 1).Status()
	invalid := apierrors.NewInvalid(schema.GroupKind{}, "", nil).Status()
	for name, failure := range map[string]*metav1.Status{"silence": nil, "504": &timeout, "410": &gone, "422": &invalid} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			api := &silentServer{pods: []corev1.Pod{*resolvertest.Pod("p", addr.String(), "cart")}}
			server := httptest.NewServer(api)
			defer server.Close()
			sources, err := podresolver.FromAPIServer(&rest.Config{Host: server.URL}, "node1")
			require.NoError(t, err)
			r, err := podresolver.New(sources, podresolver.Config{Node: "node1", MaxStaleness: time.Second, Logger: slog.New(slog.DiscardHandler)})
			require.NoError(t, err)
			w := &world{t: t, resolver: r}
			w.run()
			defer w.stop() // before the server, which waits for its connections
			<-r.Synced()
			_, err = r.Resolve(t.Context(), addr)
			require.NoError(t, err)
			require.Eventually(t, func() bool { return api.watches.Load() == 4 }, 30*time.Second, time.Millisecond, "all watches have started")
			api.failure.Store(failure)
			api.hanging.Store(failure == nil)
			require.Eventually(t, func() bool {
				_, err := r.Resolve(t.Context(), addr)
				return assert.ObjectsAreEqual(podresolver.ErrStale, err)
			}, 30*time.Second, 10*time.Millisecond)
			require.ErrorIs(t, r.Ready(), podresolver.ErrStale)
		})
	}
}

// TestReadDoesNotRetry: a missing permission or CRD is reported with the first response.
func TestReadDoesNotRetry(t *testing.T) {
	forbidden, missing := apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "", nil).Status(), apierrors.NewNotFound(schema.GroupResource{}, "").Status()
	for name, tc := range map[string]struct {
		failure *metav1.Status
		says    []string
	}{
		"a permission": {&forbidden, []string{"pods: the agent's service account may not list and watch", "azureidentities" + custom + ": the agent's", "azurepodidentityexceptions" + custom + ": the agent's"}},
		"a definition": {&missing, []string{"azureidentities" + custom + ": the API server does not have this resource: apply the custom resource definitions", "azureidentitybindings" + custom}},
	} {
		t.Run(name, func(t *testing.T) {
			api := &silentServer{}
			api.failure.Store(tc.failure)
			server := httptest.NewServer(api)
			defer server.Close()
			sources, err := podresolver.FromAPIServer(&rest.Config{Host: server.URL}, "node1")
			require.NoError(t, err)
			_, err = podresolver.Read(t.Context(), sources, podresolver.Config{Node: "node1"})
			for _, text := range tc.says {
				require.ErrorContains(t, err, text)
			}
			if tc.failure == &missing {
				require.NotContains(t, err.Error(), "azurepodidentityexceptions", "it is optional")
			}
			assert.Zero(t, api.watches.Load())
		})
	}
}

// TestRead resolves from lists alone.
func TestRead(t *testing.T) {
	api := &silentServer{pods: []corev1.Pod{*resolvertest.Pod("p", addr.String(), "cart")}}
	server := httptest.NewServer(api)
	defer server.Close()
	sources, err := podresolver.FromAPIServer(&rest.Config{Host: server.URL}, "node1")
	require.NoError(t, err)
	r, err := podresolver.Read(t.Context(), sources, podresolver.Config{Node: "node1"})
	require.NoError(t, err)
	pod, err := r.Resolve(t.Context(), addr)
	require.NoError(t, err)
	assert.Equal(t, "shop/p", pod.String())
	assert.Zero(t, api.watches.Load(), "nothing is watched")
}
