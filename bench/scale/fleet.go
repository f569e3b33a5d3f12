package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// A fleet is the part of many agents that talks to the API server, all started at once, in a
// process of its own: client-go reads the environment once whether it may use WatchList.

// fleetRun is what a fleet is to do.
type fleetRun struct {
	Kubeconfig string
	Agents     int
	Informers  bool // are client-go's instead of the agent
	Accounts   bool // the agent reads service accounts, too
}

// fleetResult is what it did until all had synced.
type fleetResult struct {
	Requests, Bytes int64 // read, TLS included
	Seconds         float64
}

// restarts measures what a start of the agent costs the API server, in a fleet of which all
// start at once.
func (b *bench) restarts(ctx context.Context) error {
	for _, v := range []struct {
		name      string
		informers bool
		watchList string
	}{
		{"the agent: pods by WatchList, the rest by lists", false, "true"},
		{"the agent, without WatchList", false, "false"},
		{"client-go's informers, all by WatchList", true, "true"},
		{"client-go's informers, all by lists", true, "false"},
	} {
		if err := b.restart(ctx, v.name, fleetRun{Informers: v.informers}, v.watchList); err != nil {
			return err
		}
	}
	m, err := measure.MemoryOf(b.large.APIServer().PID())
	b.report.Add("restart, API server's part for each agent", "API server's highest resident memory", mib(m.Peak), "MiB").
		Notef("%d identities and bindings, %d pods", b.identities, b.others+len(b.pods))
	return err
}

// restart measures one fleet.
func (b *bench) restart(ctx context.Context, name string, run fleetRun, watchList string) error {
	run.Kubeconfig, run.Agents = b.large.Kubeconfig, b.agents
	before, err := measure.CPUTime(b.large.APIServer().PID())
	if err != nil {
		return err
	}
	got, err := runFleet(ctx, run, watchList)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	after, err := measure.CPUTime(b.large.APIServer().PID())
	if err != nil {
		return err
	}
	each := func(total float64) float64 { return total / float64(b.agents) }
	b.report.Add("restart, API server's part for each agent", name+": CPU time", each(ms(after-before)), "ms").
		Notef("%.1f requests, %.2f MiB read; all %d synced after %.2f s", each(float64(got.Requests)), each(mib(got.Bytes)), b.agents, got.Seconds)
	return nil
}

func runFleet(ctx context.Context, run fleetRun, watchList string) (got fleetResult, err error) {
	self, err := os.Executable()
	if err != nil {
		return got, err
	}
	spec, err := json.Marshal(run)
	if err != nil {
		return got, err
	}
	cmd := exec.CommandContext(ctx, self, "-fleet", string(spec))
	cmd.Env = append(os.Environ(), "KUBE_FEATURE_WatchListClient="+watchList)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return got, err
	}
	return got, json.Unmarshal(out, &got)
}

// playFleet is the process.
func playFleet(ctx context.Context, spec string) error {
	klog.LogToStderr(false) // what informers say of each other's disconnections
	klog.SetOutput(io.Discard)
	var run fleetRun
	if err := json.Unmarshal([]byte(spec), &run); err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, 5*time.Minute)
	defer stop()
	var got fleetResult
	var requests, bytes atomic.Int64
	began := time.Now()
	var synced []<-chan struct{}
	for i := range run.Agents {
		config, err := clientcmd.BuildConfigFromFlags("", run.Kubeconfig)
		if err != nil {
			return err
		}
		config.QPS = -1
		config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			return &countingConn{conn, &bytes}, err
		}
		config.Wrap(func(next http.RoundTripper) http.RoundTripper { return &countingTransport{next, &requests} })
		node := fmt.Sprintf("node-%04d", 2+i)
		start := startInformers
		if !run.Informers {
			start = startAgent(podresolver.Federation{ServiceAccounts: run.Accounts})
		}
		done, err := start(ctx, config, node)
		if err != nil {
			return err
		}
		synced = append(synced, done)
	}
	for _, done := range synced {
		select {
		case <-done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	got.Seconds, got.Requests, got.Bytes = time.Since(began).Seconds(), requests.Load(), bytes.Load()
	return json.NewEncoder(os.Stdout).Encode(got)
}

// startAgent is what an agent does; it returns what is closed when it has synced.
func startAgent(federation podresolver.Federation) func(context.Context, *rest.Config, string) (<-chan struct{}, error) {
	return func(ctx context.Context, config *rest.Config, node string) (<-chan struct{}, error) {
		sources, err := podresolver.FromAPIServer(config, node)
		if err != nil {
			return nil, err
		}
		resolver, err := podresolver.New(sources, podresolver.Config{Node: node, Federation: federation, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			return nil, err
		}
		go resolver.Run(ctx)
		return resolver.Synced(), nil
	}
}

// startInformers reads the same with client-go's dynamic informers.
func startInformers(ctx context.Context, config *rest.Config, node string) (<-chan struct{}, error) {
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	all := dynamicinformer.NewDynamicSharedInformerFactory(client, 0)
	for _, resource := range []schema.GroupVersionResource{aadpodidentity.AzureIdentities, aadpodidentity.AzureIdentityBindings, aadpodidentity.AzurePodIdentityExceptions} {
		all.ForResource(resource).Informer()
	}
	own := dynamicinformer.NewFilteredDynamicSharedInformerFactory(client, 0, metav1.NamespaceAll, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", node).String()
	})
	own.ForResource(corev1.SchemeGroupVersion.WithResource("pods")).Informer()
	all.Start(ctx.Done())
	own.Start(ctx.Done())
	synced := make(chan struct{})
	go func() {
		all.WaitForCacheSync(ctx.Done())
		own.WaitForCacheSync(ctx.Done())
		close(synced)
	}()
	return synced, nil
}

type countingConn struct {
	net.Conn
	read *atomic.Int64
}

func (c *countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read.Add(int64(n))
	return n, err
}

type countingTransport struct {
	next     http.RoundTripper
	requests *atomic.Int64
}

func (t *countingTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	t.requests.Add(1)
	return t.next.RoundTrip(r)
}
