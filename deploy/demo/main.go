// Command demo shows what the agent does, with nothing but this machine: it
// builds a node with four pods and a stand-in for Azure's metadata service out
// of network namespaces, runs the agent's own packages on the manifests beside
// this file, and tells what happens as the pods ask for tokens.
//
// main.go builds the parts and takes them down, story.go tells.
package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

//go:embed *.yaml
var manifests embed.FS

const (
	nodeName = "demo-node"
	port     = 2579
	// latency of the stand-in, about what the real service takes for a token
	// that it has at hand.
	latency = 40 * time.Millisecond
)

// addresses are what the kubelet would have written into the pods' status.
var addresses = map[string]string{
	"shop/cart":            "10.244.0.11",
	"shop/report":          "10.244.0.12",
	"monitoring/collector": "10.244.0.13",
	"shop/ledger":          "10.244.0.14",
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	switch {
	case errors.Is(err, context.Canceled):
		fmt.Println("\nInterrupted; the namespaces are gone with this process.")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if err := testbed.EnterNode(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute) // the demo ends by itself
	defer cancel()

	d := &demo{pods: make(map[string]*testbed.Pod)}
	defer d.close()
	if err := d.buildNode(); err != nil {
		return fmt.Errorf("building the node: %w", err)
	}
	if err := d.buildAgent(); err != nil {
		return fmt.Errorf("building the agent: %w", err)
	}
	return d.tell(ctx)
}

// demo is the node, what is connected to it, and the agent on it.
type demo struct {
	network  *testbed.Network
	imds     *imdstest.Server
	entra    *entra
	pods     map[string]*testbed.Pod // by namespace/name
	objects  []*unstructured.Unstructured
	resolver *podresolver.Resolver
	rules    *iptables.Reconciler
	server   *proxy.Server
	listener net.Listener
	asked    int // tokens that pods have asked for

	closers []func()
}

func (d *demo) onClose(fn func()) { d.closers = append(d.closers, fn) }

func (d *demo) close() {
	for i := len(d.closers) - 1; i >= 0; i-- {
		d.closers[i]()
	}
}

func (d *demo) buildNode() (err error) {
	if d.objects, err = testbed.ReadManifests(manifests, "*.yaml"); err != nil {
		return err
	}
	if d.network, err = testbed.NewNetwork(); err != nil {
		return err
	}
	for name, addr := range addresses {
		if d.pods[name], err = d.network.AddPod(addr, testbed.Ptp); err != nil {
			return err
		}
	}
	d.imds = imdstest.NewServer(imdstest.Config{Latency: latency, Identities: identities(d.objects)})
	ln, err := d.network.Metadata.Listen(testbed.MetadataAddress)
	if err != nil {
		return err
	}
	d.onClose(d.imds.Serve(ln))
	d.entra = startEntra()
	d.onClose(d.entra.https.Close)
	return nil
}

// identities are those that the machine carries: all in the manifests.
func identities(objects []*unstructured.Unstructured) []imdstest.Identity {
	var all []imdstest.Identity
	for _, o := range objects {
		if o.GetKind() == "AzureIdentity" {
			clientID, _, _ := unstructured.NestedString(o.Object, "spec", "clientID")
			resourceID, _, _ := unstructured.NestedString(o.Object, "spec", "resourceID")
			all = append(all, imdstest.Identity{ClientID: clientID, ResourceID: resourceID})
		}
	}
	return all
}

// buildAgent puts the agent together as cmd/nmi does, with client-go's fake of
// what the API server lists.
func (d *demo) buildAgent() error {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the story is told instead
	klog.SetSlogLogger(slog.Default())

	cluster := resolvertest.NewCluster()
	for _, o := range d.objects {
		var typed runtime.Object
		switch o.GetKind() {
		case "Pod":
			typed = &corev1.Pod{}
		case "ServiceAccount":
			typed = &metav1.PartialObjectMetadata{} // all that the agent asks for
		case "AzureIdentity":
			typed = &aadpodidentity.AzureIdentity{}
		case "AzureIdentityBinding":
			typed = &aadpodidentity.AzureIdentityBinding{}
		case "AzurePodIdentityException":
			typed = &aadpodidentity.AzurePodIdentityException{}
		default:
			continue // of no interest to a resolver
		}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, typed); err != nil {
			return err
		}
		if pod, ok := typed.(*corev1.Pod); ok {
			// The scheduler's part, and the kubelet's.
			pod.Spec.NodeName = nodeName
			pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: addresses[pod.Namespace+"/"+pod.Name]}
		}
		cluster.Add(typed)
	}
	var err error
	if d.resolver, err = podresolver.New(cluster.Sources(), podresolver.Config{Node: nodeName, Federation: d.entra.federation()}); err != nil {
		return err
	}
	metadata := netip.MustParseAddrPort(testbed.MetadataAddress)
	cfg := upstream.Config{IMDS: &url.URL{Scheme: "http", Host: testbed.MetadataAddress}, UserAgent: "nmi/demo"}
	d.entra.trust(&cfg)
	source := upstream.New(cfg)
	d.onClose(source.Close)
	tokens := tokencache.New(source.Token, tokencache.Config{})
	d.onClose(tokens.Close)
	d.server = proxy.New(proxy.Config{Pods: d.resolver, Tokens: tokens, Upstream: source})
	d.rules, err = iptables.New(iptables.Config{
		Mode: iptables.ModeAuto, Pods: d.resolver.Addresses,
		Metadata: metadata, Port: port, Address: iptables.DefaultAddress, Interval: time.Minute,
	})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return err
	}
	d.listener = listener.OnlyRedirected(ln, metadata)
	return nil
}

// start runs the agent until the demo is closed, and returns once it is ready.
func (d *demo) start(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	d.onClose(func() { cancel(); running.Wait() })
	running.Go(func() { d.resolver.Run(ctx) })
	running.Go(func() { _ = d.server.Serve(ctx, d.listener) })
	select {
	case <-d.resolver.Synced():
	case <-ctx.Done():
		return ctx.Err()
	}
	running.Go(func() { d.rules.Run(ctx) })
	for d.rules.Status().Err != nil {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return errors.Join(ctx.Err(), d.rules.Status().Err)
		}
	}
	return nil
}
