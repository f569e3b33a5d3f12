// Package resolvertest stands in for a cluster in tests of what resolves pods by
// it, and in the demo: client-go's own fake of what can be listed and watched, for
// each kind of object that a resolver reads.
package resolvertest

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	cachetesting "k8s.io/client-go/tools/cache/testing"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Cluster is the objects of a cluster. It is safe for concurrent use.
type Cluster struct {
	Pods, Identities, Bindings, Exceptions, Assigned *cachetesting.FakeControllerSource
}

// NewCluster returns a cluster of these objects.
func NewCluster(objects ...runtime.Object) *Cluster {
	c := &Cluster{
		Pods:       cachetesting.NewFakeControllerSource(),
		Identities: cachetesting.NewFakeControllerSource(),
		Bindings:   cachetesting.NewFakeControllerSource(),
		Exceptions: cachetesting.NewFakeControllerSource(),
		Assigned:   cachetesting.NewFakeControllerSource(),
	}
	for _, o := range objects {
		c.Add(o)
	}
	return c
}

// Close ends the goroutines of the fakes; nothing may be done with c any more.
func (c *Cluster) Close() {
	for _, source := range []*cachetesting.FakeControllerSource{c.Pods, c.Identities, c.Bindings, c.Exceptions, c.Assigned} {
		source.Shutdown()
	}
}

// Sources is what a Resolver reads from.
func (c *Cluster) Sources() podresolver.Sources {
	return podresolver.Sources{
		Pods: listed{c.Pods}, Identities: listed{c.Identities}, Bindings: listed{c.Bindings},
		Exceptions: listed{c.Exceptions}, Assigned: listed{c.Assigned},
	}
}

// listed is a source that cannot stream its first list.
type listed struct {
	*cachetesting.FakeControllerSource
}

// IsWatchListSemanticsUnSupported is how client-go finds out.
func (listed) IsWatchListSemanticsUnSupported() bool { return true }

// Add adds an object, Modify replaces it, Delete removes it.
func (c *Cluster) Add(o runtime.Object) { c.of(o).Add(o) }

// Modify replaces the object of the same name.
func (c *Cluster) Modify(o runtime.Object) { c.of(o).Modify(o) }

// Delete removes the object of this name.
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
	}
	panic(fmt.Sprintf("no resolver reads a %T", o))
}
