package podresolver_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// streamed is a source of pods that streams the first list (WatchList), as API servers do since
// Kubernetes 1.34.
type streamed struct {
	t       *testing.T
	watches chan *watch.FakeWatcher
}

func (s *streamed) List(metav1.ListOptions) (runtime.Object, error) {
	s.t.Error("unexpected list")
	return &corev1.PodList{}, nil
}

func (s *streamed) Watch(o metav1.ListOptions) (watch.Interface, error) {
	assert.True(s.t, o.SendInitialEvents != nil && *o.SendInitialEvents)
	w := watch.NewFake()
	s.watches <- w
	return w, nil
}

var _ cache.ListerWatcher = (*streamed)(nil)

func TestStreamingList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := resolvertest.NewCluster(cart()...)
		t.Cleanup(cluster.Close)
		pods := &streamed{t: t, watches: make(chan *watch.FakeWatcher)}
		sources := cluster.Sources()
		sources.Pods = pods
		r, err := podresolver.New(sources, podresolver.Config{Node: "node1"})
		require.NoError(t, err)
		w := &world{t: t, Cluster: cluster, resolver: r}
		w.run()

		events := <-pods.watches
		version := func(p *corev1.Pod, v string) *corev1.Pod { p.ResourceVersion = v; return p }
		events.Add(version(resolvertest.Pod("p", addr.String(), "cart"), "1"))
		events.Add(version(resolvertest.Pod("q", other.String(), "cart"), "2"))
		events.Modify(version(resolvertest.Pod("p", addr.Next().Next().String(), "cart"), "3"))
		events.Delete(version(resolvertest.Pod("q", other.String(), "cart"), "4"))
		synctest.Wait()
		require.ErrorContains(t, r.Ready(), "pods: waiting for the first list", "the list is incomplete")

		end := &corev1.Pod{}
		end.ResourceVersion = "5"
		end.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		events.Action(watch.Bookmark, end)
		<-r.Synced()
		assert.Equal(t, "p", w.name(addr.Next().Next()))
		assert.Equal(t, 1, r.Stats().Addresses)

		// Then it is watched, and a bookmark counts as a response.
		time.Sleep(time.Minute)
		end.Annotations = nil
		events.Action(watch.Bookmark, version(end, "6"))
		synctest.Wait()
		for _, watched := range r.Stats().Watches {
			if watched.Resource == "pods" {
				assert.Zero(t, watched.StaleFor)
			}
		}
		events.Modify(version(resolvertest.Pod("p", addr.String(), "cart"), "7"))
		synctest.Wait()
		assert.Equal(t, "p", w.name(addr))
	})
}
