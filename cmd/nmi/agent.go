package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// runAgent runs until ctx ends and returns nil, or returns an error when a part
// cannot start or fails for good.
//
// Start: listen, sync with the API server, redirect, ready. What would make the
// agent useless is found out before it touches anything.
//
// Stop: not ready, finish the requests under way, close. The iptables rules stay,
// so that no pod reaches the node's identity while there is no agent.
func runAgent(ctx context.Context, cfg config, log *slog.Logger) error {
	ctx, stop := context.WithCancel(ctx) // by a signal, or because a part failed
	defer stop()
	log.Info("starting", "version", version, "node", cfg.node, "redirect_mode", cfg.mode)
	if cfg.headerOptional {
		log.Warn(`the header "Metadata: true" is not asked for: pods that fetch URLs for others can be made to fetch tokens`)
	}
	var resolver *podresolver.Resolver
	rules, err := iptables.New(iptables.Config{
		Mode: cfg.mode, Metadata: cfg.metadata, Port: cfg.port, Address: cfg.address,
		Interval: cfg.interval, Backend: cfg.backend, Logger: log,
		Pods: func() ([]netip.Addr, <-chan struct{}) { return resolver.Addresses() },
	})
	if err != nil {
		return err
	}
	if resolver, err = newResolver(cfg, log); err != nil {
		return err
	}
	probes, err := listen(ctx, "http-probe-port", netip.AddrPortFrom(netip.IPv4Unspecified(), cfg.probePort))
	if err != nil {
		return err
	}
	defer probes.Close()
	ln, err := listen(ctx, "nmi-port", listenAddr(cfg))
	if err != nil {
		return err
	}
	defer ln.Close()

	source := upstream.New(upstream.Config{
		IMDS:      &url.URL{Scheme: "http", Host: cfg.metadata.String()},
		UserAgent: cfg.userAgent,
	})
	defer source.Close()
	tokens := tokencache.New(source.Token, tokencache.Config{})
	defer tokens.Close()
	server := proxy.New(proxy.Config{
		Pods: resolver, Tokens: tokens, Upstream: source,
		MetadataHeaderOptional: cfg.headerOptional, BlockInstanceMetadata: cfg.blockInstance,
		Logger: log,
	})

	stopping := func() error {
		if ctx.Err() != nil {
			return errStopping
		}
		return nil
	}
	installed := func() error { return rules.Status().Err }
	status := &health{checks: []func() error{stopping, resolver.Ready, installed}, note: func() string {
		s := rules.Status()
		note := fmt.Sprintf("redirect mode %s: %s", s.Mode, s.Why)
		if err := resolver.Stale(); err != nil {
			note += "\ndecisions may be out of date:\n- " + strings.ReplaceAll(err.Error(), "\n", "\n- ")
		}
		return note
	}}
	probeServer := &http.Server{Handler: status.handler(), ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: time.Minute}

	// What requests need outlives them: it ends when Serve has returned.
	behind, stopBehind := context.WithCancel(context.WithoutCancel(ctx))
	var parts sync.WaitGroup
	parts.Go(func() { resolver.Run(behind) })
	parts.Go(func() {
		select {
		case <-resolver.Synced():
			log.Info("in sync with the API server")
			rules.Run(ctx)
		case <-ctx.Done():
		}
	})
	parts.Go(func() { _ = probeServer.Serve(probes) }) // always an error, after Close

	log.Info("listening", "address", ln.Addr().String())
	err = server.Serve(ctx, proxy.OnlyRedirected(ln, cfg.metadata))
	stop()
	stopBehind()
	_ = probeServer.Close()
	parts.Wait()
	if err != nil {
		return fmt.Errorf("serving: %w", err)
	}
	if installed() == nil {
		log.Info("stopped; the iptables rules stay, so that no pod reaches the node's identity (nmi cleanup removes them)")
	} else {
		log.Info("stopped; this agent has put no iptables rules in place")
	}
	return nil
}

// newResolver connects the resolver to the API server. Nothing is sent yet: an
// API server that cannot be reached is waited for.
func newResolver(cfg config, log *slog.Logger) (*podresolver.Resolver, error) {
	var restConfig *rest.Config
	var err error
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
	restConfig.UserAgent = cfg.userAgent
	kube, err := kubernetes.NewForConfig(restConfig)
	if err != nil {
		return nil, fmt.Errorf("client for the API server: %w", err)
	}
	custom, err := dynamic.NewForConfig(restConfig)
	if err != nil {
		return nil, fmt.Errorf("client for the API server: %w", err)
	}
	return podresolver.New(kube, custom, podresolver.Config{Node: cfg.node, Logger: log})
}

// listenAddr is where redirected connections arrive: REDIRECT sends them to the
// address of whichever interface they came in on, DNAT to one of our own. Either
// may be next in mode auto.
func listenAddr(cfg config) netip.AddrPort {
	if cfg.mode == iptables.DNAT {
		return netip.AddrPortFrom(cfg.address, cfg.port)
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), cfg.port)
}

// listen opens a TCP listener whose port was chosen by a flag.
func listen(ctx context.Context, flagName string, addr netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failure error
		err := c.Control(func(fd uintptr) {
			// Listening comes before redirecting, and so before the address that
			// DNAT leads to is on lo (ip(7), IP_FREEBIND).
			failure = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
		})
		return errors.Join(err, failure)
	}}
	ln, err := lc.Listen(ctx, "tcp4", addr.String())
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("port %d is taken: stop the program that listens there (another NMI?) or choose another --%s", addr.Port(), flagName)
	}
	if err != nil {
		return nil, fmt.Errorf("listening for --%s: %w", flagName, err)
	}
	return ln, nil
}
