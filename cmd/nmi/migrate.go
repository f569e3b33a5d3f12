package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/cmd/nmi/migrate"
	"github.com/podidentity/nmi/cmd/nmi/terminal"
	"github.com/podidentity/nmi/podresolver"
)

const migrateTimeout = 5 * time.Minute

// migrateCommand plans the way to federation.
func migrateCommand(c *config) *cobra.Command {
	var o migrate.Options
	var output string
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "Plan the way from identities on the nodes to federation",
		Long: `migrate reads all AzureIdentities, bindings, exceptions and pods of the cluster, and says of
each AzureIdentity which service accounts its pods have, which federated credentials (or
AKS identity bindings) they need, what keeps it on the nodes, and whether it may leave the
scale set now. It prints az and kubectl commands to read and run, and changes nothing.

It does not ask Azure. A federated credential that exists is created again without harm; under another
name Azure refuses it, because the identity has one with this issuer and subject already.

It knows the pods that there are, finished ones included, and nothing of those to come: of a CronJob
whose last pods are gone, or of a Deployment without replicas.

Run it where kubectl works (KUBECONFIG), with the agents' flags: --operation-mode is required, and
--federation-tenant-id if they have it.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.logger(cmd.ErrOrStderr())
			if !cmd.Flags().Changed(flagOperationMode) {
				return fmt.Errorf("--%s is required: that of the agents", flagOperationMode)
			}
			if err := c.checkMigration(o, cmd.Flags().Changed(flagAudience)); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), migrateTimeout)
			defer cancel()
			o.Audience, o.Mode, o.TenantID = c.federation.audience, c.resolver.Mode, c.resolver.Federation.TenantID
			plan, err := planMigration(ctx, c.resolver, o)
			if err != nil {
				return err
			}
			if output == outputJSON {
				return writeIndented(cmd.OutOrStdout(), plan)
			}
			plan.Print(terminal.New(cmd.OutOrStdout()))
			return nil
		},
	}
	cmd.Flags().StringVar(&o.Issuer, "issuer", "", "issuer of the cluster's service account tokens; by default the API server is asked")
	cmd.Flags().BoolVar(&o.IdentityBindings, "identity-bindings", false, "plan for AKS identity bindings in place of federated credentials")
	addOutput(cmd.Flags(), &output)
	c.addResolverFlags(cmd.Flags())
	requests := pflag.NewFlagSet("", pflag.ContinueOnError)
	c.addTokenRequestFlags(requests)
	cmd.Flags().AddFlag(requests.Lookup(flagAudience))
	c.addLogFlags(cmd.Flags())
	return cmd
}

// checkMigration refuses what would come out as commands that do not work.
func (c *config) checkMigration(o migrate.Options, audience bool) error {
	issuer, err := url.Parse(o.Issuer)
	switch {
	case o.IdentityBindings && audience:
		return errors.New("--" + flagAudience + " has no meaning with --identity-bindings, whose audience is AKS's own")
	case o.Issuer != "" && (err != nil || issuer.Scheme != "https" || issuer.Host == ""):
		return fmt.Errorf("--issuer=%s: want https://<host>[/<path>], as kubectl get --raw /.well-known/openid-configuration says", o.Issuer)
	}
	return c.checkAudience()
}

func planMigration(ctx context.Context, cfg podresolver.Config, o migrate.Options) (*migrate.Plan, error) {
	restConfig, err := apiServer("nmi/" + version)
	if err != nil {
		return nil, err
	}
	from, err := podresolver.FromAPIServer(restConfig, "")
	if err != nil {
		return nil, err
	}
	if !slog.Default().Enabled(ctx, slog.LevelDebug) {
		cfg.Logger = slog.New(slog.DiscardHandler)
		klog.SetSlogLogger(cfg.Logger)
	}
	inventory, err := podresolver.TakeInventory(ctx, from, cfg)
	if err != nil {
		return nil, fmt.Errorf("reading the cluster:\n%s", list(err))
	}
	if o.Issuer == "" && !o.IdentityBindings {
		if o.Issuer, err = issuerOf(ctx, restConfig); err != nil {
			return nil, fmt.Errorf("asking the API server for its issuer (give --issuer): %w", err)
		}
	}
	return migrate.New(inventory, o), nil
}

// issuerOf asks the API server (kubernetes.io, "Service account issuer discovery").
func issuerOf(ctx context.Context, restConfig *rest.Config) (string, error) {
	client, err := rest.HTTPClientFor(restConfig)
	if err != nil {
		return "", err
	}
	base, _, err := rest.DefaultServerUrlFor(restConfig)
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(base.String(), "/")+"/.well-known/openid-configuration", nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var configuration struct {
		Issuer string `json:"issuer"`
	}
	const most = 1 << 20
	err = json.NewDecoder(io.LimitReader(resp.Body, most)).Decode(&configuration)
	switch {
	case resp.StatusCode != http.StatusOK:
		return "", errors.New(resp.Status)
	case err != nil:
		return "", err
	}
	return configuration.Issuer, nil
}
