package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"golang.org/x/time/rate"

	"github.com/podidentity/nmi/cmd/nmi/bootguard"
	"github.com/podidentity/nmi/cmd/nmi/events"
	"github.com/podidentity/nmi/cmd/nmi/handover"
	"github.com/podidentity/nmi/cmd/nmi/startuptaint"
	"github.com/podidentity/nmi/cmd/nmi/telemetry"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// agent is the parts of a running agent.
type agent struct {
	cfg      config
	log      *slog.Logger
	resolver *podresolver.Resolver
	rules    *iptables.Reconciler
	links    *links.Tracker
	upstream *upstream.Upstream
	tokens   *tokencache.Cache
	server   *proxy.Server
	handover *handover.Handover
	events   *events.Writer
	taint    *startuptaint.Manager // nil without --startup-taint
	guard    *bootguard.Guard      // nil without --boot-guard-dir
	front    *handover.Listener    // pods' connections arrive here; nil before start

	unidentified *rate.Limiter // of log lines, see identify

	traces      *telemetry.Traces // nil unless they are exported
	stopMetrics func()            // ends their export by OTLP

	health                       *health
	probeSocket, probes, metrics *page
	profiles                     *page // with --enableProfile

	probeServer *component   // on the probe socket, from first to last
	background  []*component // from start to stop
	duties      []*component // while no other agent of the node has them, see handover
}

// runAgent runs until ctx ends and returns nil, or returns an error when the agent cannot
// start or its listener fails for good.
//
// Only what tokens need may end a start: the flags, the right to write the rules, a
// configuration of the API server's client, the port for pods, and another agent that
// owns the node. Anything else, such as the ports of pages, is a warning and is tried
// again, see page.go.
func runAgent(ctx context.Context, cfg config, log *slog.Logger) error {
	log.Info("starting", "version", version, "node", cfg.resolver.Node, "operation_mode", cfg.resolver.Mode, "redirect_mode", cfg.rules.Mode)
	cfg.warn(log)
	cfg.chooseMode(ctx, log)
	a, err := build(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer a.stop()
	if err := a.start(ctx); err != nil {
		if errors.Is(err, context.Canceled) {
			log.Info("stopped before it had taken over")
			return nil
		}
		return err
	}
	return a.serve(ctx)
}

// build makes the parts; none of them runs yet. It also locks the node, or finds the agent that
// runs on it already, and then writes the fences, before anything else can end the start: one
// that fails leaves the node closed. Whatever else has the lock is an agent, with its fences, or
// cleanup, which is there to remove them.
func build(ctx context.Context, cfg config, log *slog.Logger) (*agent, error) {
	a := &agent{cfg: cfg, log: log, handover: handover.New(cfg.handoverDir, log), unidentified: rate.NewLimiter(rate.Every(time.Minute), 1)}
	cluster, clusterErr := connect(cfg, log)
	a.resolver = cluster.resolver
	cfg.rules.Logger, cfg.links.Logger, cfg.upstream.Logger, cfg.proxy.Logger = log, log, log, log
	cfg.rules.Pods, cfg.links.Pods = a.resolver.Addresses, a.resolver.Addresses // which nothing asks for before Run
	cfg.rules.HostNetworkPods = a.resolver.HostNetworkPods
	var err error
	if a.rules, err = iptables.New(cfg.rules); err != nil {
		return nil, err
	}
	if err := a.handover.Receive(ctx); err != nil {
		return nil, err
	}
	if err := a.rules.Fence(ctx); err != nil {
		log.Warn("not all fences are in place yet; trying again", "error", err)
	}
	if clusterErr != nil {
		return nil, fmt.Errorf("%w (the fences stay, so that no pod reaches the node's identity; nmi cleanup removes them)", clusterErr)
	}
	if a.links, err = links.New(cfg.links); err != nil {
		return nil, err
	}
	cfg.upstream.Secret, cfg.upstream.ServiceAccountToken = cluster.secrets.read, cluster.accounts.request
	a.upstream = upstream.New(cfg.upstream)
	if a.traces, err = telemetry.NewTraces(ctx, version, cfg.resolver.Node, log); err != nil {
		log.Warn("traces are not exported", "error", err)
	}
	if a.traces != nil {
		cfg.proxy.Trace = a.traces.Context
	}
	a.tokens = tokencache.New(a.traces.Fetch(a.upstream.Token), tokencache.Config{InUse: proxy.InUse(a.resolver)})
	cfg.proxy.Pods, cfg.proxy.Tokens, cfg.proxy.Upstream = a.resolver, a.tokens, a.upstream
	cfg.proxy.CheckSource, cfg.proxy.Version = a.checkSource(), version
	if a.events, err = events.New(cluster.config, events.Config{Node: cfg.resolver.Node, Logger: log}); err != nil {
		return nil, err
	}
	cfg.proxy.Refused = a.events.Refused
	a.server = proxy.New(cfg.proxy)
	a.health = newHealth(ctx, a)
	a.buildPages()
	if a.stopMetrics, err = telemetry.PushMetrics(ctx, a.parts(), log); err != nil {
		log.Warn("metrics are not exported by OTLP", "error", err)
	}
	a.background = []*component{{run: a.links.Run}, {run: a.resolver.Run}, {run: a.reportSync}, {run: a.events.Run}, {run: a.dropUnused}}
	a.duties = []*component{{run: a.rules.Run}, {run: a.probes.run}, {run: a.metrics.run}, {run: a.watchRules}}
	if cfg.profile {
		a.background = append(a.background, &component{run: a.profiles.run})
	}
	if cfg.bootGuardDir != "" {
		a.guard = bootguard.New(bootguard.Config{
			Dir: cfg.bootGuardDir, Commands: iptables.RoutingFence(cfg.rules.Metadata.Addr()), Interval: cfg.rules.Interval, Logger: log,
		})
		a.duties = append(a.duties, &component{run: a.guard.Run})
	}
	if cfg.startupTaint.Key == "" {
		return a, nil
	}
	a.taint, err = startuptaint.New(cluster.config, startuptaint.Config{
		Node: cfg.resolver.Node, Taint: cfg.startupTaint, Logger: log,
		Ready: a.health.err, Rules: func() error { return a.rules.Status().Err },
	})
	if err != nil {
		return nil, err
	}
	a.duties = append(a.duties, &component{run: a.taint.Run})
	return a, nil
}

// start runs the parts. The rules come before the agent can decide anything, so that no
// pod reaches the node's identity from the first moment on; until it can decide, pods are
// told to try again. Where another agent runs already, this one syncs first, and then
// takes over from it.
func (a *agent) start(ctx context.Context) error {
	running := context.WithoutCancel(ctx) // until stop: requests under way need it
	if a.cfg.probeSocket != "" {
		a.probeServer.Start(running)
	}
	a.probes.adopt(a.handover.Inherit(flagProbePort, a.cfg.probes.addr))
	a.metrics.adopt(a.handover.Inherit(flagPrometheusPort, a.cfg.metrics.addr))
	front := a.handover.Inherit(flagPort, a.cfg.front.addr)
	if front == nil {
		var err error
		if front, err = listen(ctx, a.cfg.front); err != nil {
			return err
		}
	}
	a.front = &handover.Listener{TCPListener: front}
	for _, c := range a.background {
		c.Start(running)
	}
	var received receivedState
	if err := a.handover.Acquire(ctx, a.resolver.Synced(), received.add); err != nil {
		return err
	}
	a.restore(received)
	if a.handover.Succeeds() {
		a.upstream.Share(ctx) // until serve hears of the other agent's end
		a.upstream.PauseUntil(time.Now().Add(minPause))
	}
	a.resume(running)
	return nil
}

// serve answers pods until ctx ends, while it offers new agents to take over. Then it
// finishes the requests under way. The iptables rules stay.
func (a *agent) serve(ctx context.Context) error {
	running := context.WithoutCancel(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	handedOver := make(chan bool, 1)
	go func() {
		handedOver <- a.handover.Offer(ctx, handover.Duties{
			Front: a.front, Listeners: a.pageListeners, Tokens: a.sendState,
			Release: func() { a.release(running) }, Resume: func() { a.resumeAlone(running) },
		})
	}()
	a.log.Info("listening", "address", a.front.Addr().String())
	ln, err := a.onlyPods(a.front)
	if err == nil {
		err = a.server.Serve(ctx, ln)
	}
	cancel()
	switch handedOver := <-handedOver; {
	case err != nil:
		return fmt.Errorf("serving: %w", err)
	case handedOver:
		a.log.Info("stopped; another agent has taken over")
	case a.cfg.rules.Mode == iptables.None:
		a.log.Info("stopped; nobody redirects to this agent any more, and only its fences keep pods from the metadata service, where their packets pass the node's routing (nmi cleanup removes them)")
	case a.rules.Status().Err == nil:
		a.log.Info("stopped; the iptables and routing rules stay, so that no pod reaches the node's identity (nmi cleanup removes them)")
	default:
		a.log.Info("stopped; not all of this agent's rules were in place")
	}
	return nil
}

// release stops what another agent is to do: the duties, and keeping connections. Until no more
// requests to IMDS are in flight than its half, this agent goes on with all of it.
func (a *agent) release(ctx context.Context) {
	a.upstream.Share(ctx)
	for _, c := range a.duties {
		c.Stop()
	}
	a.server.SetDraining(true)
}

// resumeAlone is resume when no other agent runs on the node.
func (a *agent) resumeAlone(ctx context.Context) {
	a.upstream.Unshare()
	a.resume(ctx)
}

// resume does it again, and looks at once for ports that the other agent may have had.
func (a *agent) resume(ctx context.Context) {
	a.server.SetDraining(false)
	for _, c := range a.duties {
		c.Start(ctx)
	}
	a.probes.retryNow()
	a.metrics.retryNow()
}

// stop ends what start has begun, in the opposite order, however far that came. An agent
// that ran before hears of it when nothing of this one's duties runs any more.
func (a *agent) stop() {
	for _, c := range append(a.duties, a.background...) {
		c.Stop()
	}
	a.probes.close()
	a.metrics.close()
	a.profiles.close()
	a.tokens.Close()
	if a.front != nil {
		_ = a.front.Close()
	}
	a.handover.Close()
	a.probeServer.Stop()
	a.probeSocket.close()
	a.upstream.Close()
	a.traces.Close()
	a.stopMetrics()
}

// reportSync logs when the agent is in sync.
func (a *agent) reportSync(ctx context.Context) {
	select {
	case <-a.resolver.Synced():
		debug.FreeOSMemory() // what reading the lists took is not needed again
		a.log.Info("in sync with the API server")
	case <-ctx.Done():
	}
}

// dropUnused drops tokens that no pod of the node is entitled to any more.
func (a *agent) dropUnused(ctx context.Context) { proxy.DropUnused(ctx, a.resolver, a.tokens) }

// watchRules has an Event on the node say that its rules cannot be written.
func (a *agent) watchRules(ctx context.Context) { a.events.WatchRules(ctx, a.rules.Status) }
