// Package resolvertest is a fake cluster for tests and the demo: client-go's fake source for each
// kind of object that a podresolver.Resolver reads.
package resolvertest

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	cachetesting "k8s.io/client-go/tools/cache/testing"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Cluster is a set of objects that can be listed and watched. It is safe for concurrent use.
type Cluster struct {
	Pods, Identities, Bindings, Exceptions, Assigned, ServiceAccounts *cachetesting.FakeControllerSource
}

// NewCluster returns a Cluster of these objects.
func NewCluster(objects ...runtime.Object) *Cluster {
	c := &Cluster{
		Pods:       cachetesting.NewFakeControllerSource(),
		Identities: cachetesting.NewFakeControllerSource(),
		Bindings:   cachetesting.NewFakeControllerSource(),
		Exceptions: cachetesting.NewFakeControllerSource(),
		Assigned:   cachetesting.NewFakeControllerSource(),

		ServiceAccounts: cachetesting.NewFakeControllerSource(),
	}
	for _, o := range objects {
		c.Add(o)
	}
	return c
}

// Close ends the goroutines of the fakes. c must not be used afterwards.
func (c *Cluster) Close() {
	for _, source := range []*cachetesting.FakeControllerSource{c.Pods, c.Identities, c.Bindings, c.Exceptions, c.Assigned, c.ServiceAccounts} {
		source.Shutdown()
	}
}

// Sources returns what a Resolver reads from: a podresolver.Sources, without the name, so that
// podresolver's own tests can import this package.
func (c *Cluster) Sources() struct{ Pods, Identities, Bindings, Exceptions, Assigned, ServiceAccounts cache.ListerWatcher } {
	return struct{ Pods, Identities, Bindings, Exceptions, Assigned, ServiceAccounts cache.ListerWatcher }{
		listed{c.Pods}, listed{c.Identities}, listed{c.Bindings}, listed{c.Exceptions}, listed{c.Assigned}, listed{c.ServiceAccounts},
	}
}

// listed is a source without WatchList.
type listed struct {
	*cachetesting.FakeControllerSource
}

// IsWatchListSemanticsUnSupported tells client-go to list.
func (listed) IsWatchListSemanticsUnSupported() bool { return true }

// Add adds an object.
func (c *Cluster) Add(o runtime.Object) { c.of(o).Add(o) }

// Modify replaces the object of the same name.
func (c *Cluster) Modify(o runtime.Object) { c.of(o).Modify(o) }

// Delete removes the object of the same name.
func (c *Cluster) Delete(o runtime.Object) { c.of(o).Delete(o) }

func (c *Cluster) of(o runtime.Object) *cachetesting.FakeControllerSource {
	switch o.(type) {
	case *corev1.Pod:
		return c.Pods
	case *aadpodidentity.AzureIdentity:
		return c.Identities
	case *aadpodidentity.AzureIdentityBinding:
		return c.Bindings
	case *aadpodidentity.AzurePodIdentityException:
		return c.Exceptions
	case *aadpodidentity.AzureAssignedIdentity:
		return c.Assigned
	case *metav1.PartialObjectMetadata:
		return c.ServiceAccounts
	}
	panic(fmt.Sprintf("no resolver reads a %T", o))
}
