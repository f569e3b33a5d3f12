package upstream

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

const imdsLatency = 100 * time.Millisecond

// realResources are those that Entra knows in these tests: one for each of a node's pods.
var realResources = func() (all []string) {
	for i := range 250 {
		all = append(all, fmt.Sprintf("https://%d.example", i))
	}
	return all
}()

func podAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }

func keyFor(resource string) tokencache.Key {
	return tokencache.Key{ClientID: known.ClientID, Resource: resource}
}

// limitedNode is a node with the defaults before an IMDS that keeps its limits.
func limitedNode(t *testing.T) (imds *imdstest.Server, u *Upstream, cache *tokencache.Cache, stop func()) {
	t.Helper()
	imds = imdstest.NewServer(imdstest.Config{
		Identities: []imdstest.Identity{known}, Resources: realResources, Latency: imdsLatency, PerSecond: 20, AtOnce: 5,
	})
	u, stopServing := inMemory(t, imds)
	cache = tokencache.New(u.Token, tokencache.Config{})
	return imds, u, cache, func() { cache.Close(); stopServing() }
}

// All pods of a full node start at once, each with a key of its own, while a few others
// make up resources and IMDS has some requests tried again.
func TestFullNodeStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds, _, cache, stop := limitedNode(t)
		defer stop()
		var others sync.WaitGroup
		defer others.Wait()
		for i := range 100 { // five pods that want as much as they may have
			others.Go(func() { _, _ = cache.Get(t.Context(), keyFor(fmt.Sprintf("made-up-%d", i)), podAddr(1000+i%5)) })
		}
		synctest.Wait()
		for range 10 { // as a service that is being updated does
			imds.Inject(make([]imdstest.Fault, 20)...)
			imds.Inject(imdstest.Fault{Status: http.StatusNotFound})
		}
		began := time.Now()
		var pods sync.WaitGroup
		var slowest atomic.Int64
		for i, resource := range realResources {
			pods.Go(func() {
				_, err := cache.Get(t.Context(), keyFor(resource), podAddr(i))
				assert.NoError(t, err, "%s after %s", resource, time.Since(began))
				for took := int64(time.Since(began)); ; {
					if old := slowest.Load(); old >= took || slowest.CompareAndSwap(old, took) {
						return
					}
				}
			})
		}
		pods.Wait()
		t.Logf("the last of %d pods was served after %s", len(realResources), time.Duration(slowest.Load()))
		atOnce, perSecond := imds.Peak()
		assert.LessOrEqual(t, atOnce, 4)
		assert.LessOrEqual(t, perSecond, 18)
	})
}

// Pods that make up resources without end use up neither what the node's own programs
// may ask of IMDS nor what other pods may.
func TestMadeUpResourcesLeaveTheNodeItsShare(t *testing.T) {
	for _, hostile := range []int{1, 10} {
		t.Run(fmt.Sprintf("%d pods", hostile), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds, u, cache, stop := limitedNode(t)
				defer stop()
				ctx, end := context.WithTimeout(t.Context(), time.Minute)
				defer end()
				var all sync.WaitGroup
				defer all.Wait()
				for pod := range hostile {
					for conn := range 20 {
						all.Go(func() {
							for n := 0; ctx.Err() == nil; n++ {
								_, err := cache.Get(ctx, keyFor(fmt.Sprintf("made-up-%d-%d-%d", pod, conn, n)), podAddr(1000+pod))
								assert.Error(t, err)
								_ = pause(ctx, 200*time.Millisecond)
							}
						})
					}
				}
				var throttled, asked int
				all.Go(func() { // a program of the node, which asks IMDS itself
					client := &http.Client{Transport: u.transport.Clone()}
					defer client.CloseIdleConnections()
					for ctx.Err() == nil {
						req := passThroughRequest(t.Context(), t)
						req.URL.Host, req.URL.RawQuery = "imds.test", "api-version=2018-02-01&resource="+realResources[0]
						resp, err := client.Do(req)
						if assert.NoError(t, err) {
							resp.Body.Close()
							asked++
							if resp.StatusCode == http.StatusTooManyRequests {
								throttled++
							}
						}
						_ = pause(ctx, time.Second)
					}
				})
				var waits []time.Duration
				for i, resource := range realResources[:20] { // another pod
					begin := time.Now()
					_, err := cache.Get(t.Context(), keyFor(resource), podAddr(i%2))
					require.NoError(t, err)
					waits = append(waits, time.Since(begin))
					time.Sleep(2 * time.Second)
				}
				<-ctx.Done()
				all.Wait()
				t.Logf("IMDS was asked %d times in a minute; %d of the node's own %d requests were throttled; another pod waited %s at most",
					imds.Requests()-asked, throttled, asked, slices.Max(waits))
				assert.Zero(t, throttled)
				assert.LessOrEqual(t, imds.Requests()-asked, hostile*60+20)
				assert.LessOrEqual(t, slices.Max(waits), 3*time.Second)
			})
		})
	}
}
