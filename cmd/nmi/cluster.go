package main

import (
	"fmt"
	"log/slog"
	"os"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/podresolver"
)

// cluster is what the agent reads from the API server.
type cluster struct {
	config   *rest.Config
	resolver *podresolver.Resolver
	secrets  *secrets
	accounts *accountTokens
}

// connect makes the clients. They send nothing yet: an API server that cannot be reached
// is waited for.
func connect(cfg config, log *slog.Logger) (c cluster, err error) {
	restConfig, err := apiServer(cfg.upstream.UserAgent)
	if err != nil {
		return c, err
	}
	c.config = restConfig
	sources, err := podresolver.FromAPIServer(restConfig, cfg.resolver.Node)
	if err != nil {
		return c, err
	}
	cfg.resolver.Logger = log
	if c.resolver, err = podresolver.New(sources, cfg.resolver); err != nil {
		return c, err
	}
	if c.secrets, err = newSecrets(restConfig); err != nil {
		return c, err
	}
	c.accounts, err = newAccountTokens(restConfig, cfg.federation, cfg.resolver.Node, c.resolver.PodsOf)
	return c, err
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
