package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"runtime/debug"
	"sync"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// runAgent runs until ctx ends and returns nil, or returns an error when a part
// cannot start or fails for good.
//
// Start: listen, redirect, sync with the API server, ready. The rules come before
// the agent can decide anything, so that from the first moment on no pod reaches
// the node's identity; until it can, pods are told to come back. Where another
// agent is serving already, this one syncs first and then takes over from it, see
// handover.go.
//
// The fences come before everything else, so that a start which fails leaves the node
// closed. Only what tokens need may end a start: the flags, the right to write the rules, a configuration of the API
// server's client, the port for pods, and another agent that owns the node. Anything
// else, such as the ports of pages, is a warning and is tried again, see page.go.
//
// Stop: not ready, finish the requests under way, close. The iptables rules stay.
func runAgent(ctx context.Context, cfg config, log *slog.Logger) error {
	ctx, stop := context.WithCancel(ctx) // by a signal, or because a part failed
	defer stop()
	log.Info("starting", "version", version, "node", cfg.node, "redirect_mode", cfg.mode)
	cfg.warn(log)
	var resolver *podresolver.Resolver
	rules, err := iptables.New(iptables.Config{
		Mode: cfg.mode, Metadata: cfg.metadata, Port: cfg.pods.addr.Port(), Address: cfg.address,
		Interval: cfg.interval, Backend: cfg.backend,
		Pods:            func() ([]netip.Addr, <-chan struct{}) { return resolver.Addresses() },
		BlockWireserver: cfg.blockWireserver, AllowUnguarded: cfg.allowUnguarded, Logger: log,
	})
	if err != nil {
		return err
	}
	if err := rules.Fence(ctx); err != nil {
		log.Warn("not all fences are in place yet; trying again", "error", err)
	}
	tracker, err := links.New(links.Config{AllowUnguarded: cfg.allowUnguarded, Logger: log})
	if err != nil {
		return err
	}
	restConfig, err := apiServer(cfg.userAgent)
	if err != nil {
		return err
	}
	if resolver, err = newResolver(restConfig, cfg, log); err != nil {
		return err
	}
	secrets, err := newSecrets(restConfig)
	if err != nil {
		return err
	}
	after := &handover{dir: cfg.handoverDir, log: log}
	source := upstream.New(upstream.Config{
		IMDS:      &url.URL{Scheme: "http", Host: cfg.metadata.String()},
		UserAgent: cfg.userAgent, PerSecond: cfg.tokensPerSecond, AtOnce: cfg.tokensAtOnce,
		Secret: secrets.read, Authorities: cfg.authorities, Logger: log,
	})
	defer source.Close()
	probes, measured := newPortPage(cfg.probes, log), newPortPage(cfg.metrics, log)
	probeSocket := newPage(flagProbeSocket, log, func(ctx context.Context) (pageListener, error) {
		return listenUnix(ctx, "unix", cfg.probeSocket)
	})
	status := newHealth(ctx, resolver, rules, source, after.note, probes.note, measured.note, probeSocket.note)
	probes.handler = status.handler()
	// What requests need outlives them: it ends when Serve has returned.
	behind, stopBehind := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBehind()
	if cfg.probeSocket != "" {
		explainer := &explainer{resolver: resolver, config: cfg.resolving, confirm: expectCaller(tracker)}
		probeSocket.handler = explainer.handler(status.handler())
		own := &part{run: probeSocket.run}
		own.begin(behind)
		defer probeSocket.close()
		defer own.end()
	}

	before, owned, err := succeed(ctx, cfg.handoverDir, log)
	if err != nil {
		return err
	}
	defer before.close()
	after.lock = owned
	defer func() { _ = after.lock.Close() }()
	front, err := before.listen(ctx, cfg.pods)
	if err != nil {
		return err
	}
	defer front.Close() //nolint:errcheck // nobody can be told

	tokens := tokencache.New(source.Token, tokencache.Config{InUse: proxy.InUse(resolver)})
	defer tokens.Close()
	server := proxy.New(proxy.Config{
		Pods: resolver, Tokens: tokens, Upstream: source,
		MetadataHeaderOptional: cfg.headerOptional, BlockInstanceMetadata: cfg.blockInstance,
		InstanceMetadataNamespaces: cfg.instanceNamespaces,
		PodsOnly:                   cfg.mode == iptables.None, CheckSource: confirmCaller(tracker),
		HostTokenUIDs:  cfg.hostTokenUIDs,
		Allow:          cfg.allow,
		MaxConnections: cfg.maxConnections, MaxConnectionsPerPod: cfg.maxConnectionsPerPod,
		Logger: log,
	})
	after.retire = server.Retire
	after.front = &gate{TCPListener: front}
	after.begin = func(p *part) { p.begin(behind) }
	measured.handler = metrics(rules, tracker, resolver, source, tokens, server)
	probes.adopt(before.adopt(cfg.probes))
	measured.adopt(before.adopt(cfg.metrics))
	before.closeUnused()
	defer probes.close()
	defer measured.close()
	after.pages = []*page{probes, measured}
	after.parts = []*part{{run: rules.Run}, {run: probes.run}, {run: measured.run}}

	var running sync.WaitGroup
	defer running.Wait()
	defer stopBehind()
	running.Go(func() { tracker.Run(behind) })
	running.Go(func() { resolver.Run(behind) })
	if err := before.take(ctx, resolver.Synced()); ctx.Err() != nil {
		log.Info("stopped before it had taken over")
		return nil
	} else if err != nil {
		return err
	}
	for _, p := range after.parts {
		p.begin(behind)
	}
	defer after.end()
	if before != nil {
		log.Info("took over from the agent before; this one serves now", "version", version)
	}
	var giving sync.WaitGroup
	giving.Go(func() {
		if before.outlive(ctx) {
			for _, p := range after.pages {
				p.tryNow() // it may have had the port
			}
			after.run(ctx)
		} else {
			after.end() // for the predecessor to begin its own
		}
		before.close()
	})
	running.Go(func() {
		select {
		case <-resolver.Synced():
			// What was needed to read the lists is not needed again.
			debug.FreeOSMemory()
			log.Info("in sync with the API server")
		case <-ctx.Done():
		}
	})

	log.Info("listening", "address", front.Addr().String())
	var redirected net.Listener = after.front
	if cfg.mode != iptables.None {
		redirected = proxy.OnlyRedirected(redirected, cfg.metadata)
	}
	err = server.Serve(ctx, redirected)
	stop()
	giving.Wait() // from here on the parts are ours to end
	if err != nil {
		return fmt.Errorf("serving: %w", err)
	}
	switch {
	case after.given.Load():
		log.Info("stopped; another agent has taken over")
	case cfg.mode == iptables.None:
		log.Info("stopped; nobody redirects to this agent any more, and its fences alone keep pods from the metadata service, where their packets pass the node's routing (nmi cleanup removes them)")
	case rules.Status().Err == nil:
		log.Info("stopped; the iptables and routing rules stay, so that no pod reaches the node's identity (nmi cleanup removes them)")
	default:
		log.Info("stopped; not all of this agent's rules were in place")
	}
	return nil
}

// newResolver connects the resolver to the API server. Nothing is sent yet: an
// API server that cannot be reached is waited for.
func newResolver(restConfig *rest.Config, cfg config, log *slog.Logger) (*podresolver.Resolver, error) {
	from, err := podresolver.FromAPIServer(restConfig, cfg.node)
	if err != nil {
		return nil, err
	}
	resolving := cfg.resolving
	resolving.Logger = log
	return podresolver.New(from, resolving)
}

// apiServer finds the API server as KUBECONFIG says, or else as a pod does.
func apiServer(userAgent string) (restConfig *rest.Config, err error) {
	if path := os.Getenv("KUBECONFIG"); path != "" {
		restConfig, err = clientcmd.BuildConfigFromFlags("", path)
		if clientcmd.IsEmptyConfig(err) {
			return nil, fmt.Errorf("KUBECONFIG=%s has no current context that names a cluster", path)
		}
		if err != nil {
			return nil, fmt.Errorf("reading KUBECONFIG=%s: %w", path, err)
		}
	} else if restConfig, err = rest.InClusterConfig(); err != nil {
		return nil, fmt.Errorf("finding the API server: set KUBECONFIG, or run in a pod with a service account: %w", err)
	}
	restConfig.UserAgent = userAgent
	return restConfig, nil
}
