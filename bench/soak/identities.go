package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/proxy/imdstest"
)

const namespace = "shop"

// selector is a binding with two AzureIdentities that it may name, and two client IDs that
// these may have. No two selectors share any, so that a token tells whose it is.
type selector struct {
	entitlement
	name      string
	clientIDs [2]string
	has       [2]int // which client ID each AzureIdentity has
	bound     int    // which AzureIdentity the binding names
}

func newSelectors(n int) (all []*selector, identities []imdstest.Identity) {
	for i := range n {
		s := &selector{name: fmt.Sprintf("selector-%d", i)}
		for j := range s.clientIDs {
			s.clientIDs[j] = fmt.Sprintf("ca470000-0000-4000-8000-%06d%06d", i, j)
			identities = append(identities, imdstest.Identity{ClientID: s.clientIDs[j]})
		}
		all = append(all, s)
	}
	return all, identities
}

// clientID is the identity that the selector gives while it has its binding.
func (s *selector) clientID() string { return s.clientIDs[s.has[s.bound]] }

func (s *selector) object(kind, name string, spec map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": aadpodidentity.GroupVersion.String(), "kind": kind,
		"metadata": map[string]any{"namespace": namespace, "name": name}, "spec": spec,
	}}
}

func (s *selector) identityName(i int) string { return fmt.Sprintf("%s-%d", s.name, i) }

// write makes the API server's objects what the fields say.
func (s *selector) write(ctx context.Context, w *testbed.World) error {
	objects := []*unstructured.Unstructured{
		s.object("AzureIdentityBinding", s.name, map[string]any{"azureIdentity": s.identityName(s.bound), "selector": s.name}),
	}
	for i, has := range s.has {
		objects = append(objects, s.object("AzureIdentity", s.identityName(i), map[string]any{"type": int64(0), "clientID": s.clientIDs[has]}))
	}
	return testbed.Apply(ctx, w.Custom, objects)
}

// changeIdentities changes one selector after another until ctx ends: an AzureIdentity gets
// another client ID, a binding names another AzureIdentity, or a binding is away for a while.
func (s *soak) changeIdentities(ctx context.Context) error {
	lasting := context.WithoutCancel(ctx) // what has begun is finished
	for n := 0; pause(ctx, 2*time.Second); n++ {
		sel := s.selectors[rand.N(len(s.selectors))]
		write := func() error { return sel.write(lasting, s.world) }
		switch n % 3 {
		case 0:
			sel.has[sel.bound] = 1 - sel.has[sel.bound]
		case 1:
			sel.bound = 1 - sel.bound
		case 2:
			err := sel.change(none, func() error {
				return s.world.Custom.Resource(aadpodidentity.AzureIdentityBindings).Namespace(namespace).Delete(lasting, sel.name, metav1.DeleteOptions{})
			})
			if err != nil {
				return err
			}
			pause(ctx, propagation+2*time.Second) // or nobody would notice that it is still in force
		}
		if err := sel.change(sel.clientID(), write); err != nil {
			return err
		}
		s.identityChanges.Add(1)
	}
	return nil
}

// disturbIMDS makes IMDS throttle and fail in turns until ctx ends. Each fault meets one of
// the next fetches.
func (s *soak) disturbIMDS(ctx context.Context) error {
	kinds := []struct {
		imdstest.Fault
		times int
	}{
		{imdstest.Fault{Status: 429, RetryAfter: "2"}, 3},
		{imdstest.Fault{Status: 500, Body: `{"error":"server_error"}`}, 6},
		{imdstest.Fault{Delay: 3 * time.Second}, 4},
		{imdstest.Fault{Reset: true}, 3},
		{imdstest.Fault{Slow: 2 * time.Second}, 2},
		{imdstest.Fault{Status: 429, Body: `{"error":"too_many_requests"}`}, 2},
		{imdstest.Fault{Cut: true}, 2},
		{imdstest.Fault{Hang: true}, 1},
		{imdstest.Fault{Status: 503}, 6},
	}
	for n := 0; pause(ctx, 3*time.Second); n++ {
		kind := kinds[n%len(kinds)]
		for range kind.times {
			s.world.IMDS.Inject(kind.Fault)
		}
		s.faults.Add(int64(kind.times))
	}
	return nil
}
