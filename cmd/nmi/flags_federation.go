package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
)

// federationConfig is how the agent gets tokens of service accounts.
type federationConfig struct {
	audience string // of the tokens
	asNode   bool   // requests them in the name of its node
}

const (
	flagFederation          = "federation"
	flagFederationTenant    = "federation-tenant-id"
	flagFederationAuthority = "federation-authority"
	flagEntraAuthority      = "entra-authority"
	flagTokenProxy          = "federation-token-proxy"
	flagAudience            = "federation-audience"

	// defaultAudience is that of Entra in the public cloud.
	defaultAudience = "api://AzureADTokenExchange"
	// bindingsAudience is that of the token proxy of AKS identity bindings.
	bindingsAudience = "api://AKSIdentityBinding"
)

// addFederationFlags adds the flags that decide what pods get by federation, which nmi explain has,
// too.
func (c *config) addFederationFlags(fs *pflag.FlagSet) {
	f := &c.resolver.Federation
	parsedVar(fs, &f.ServiceAccounts, flagFederation, "off", parseFederation, `"annotated": service accounts with the annotation `+podresolver.ClientIDAnnotation+` give that identity to their pods, by federation; "off": AzureIdentities alone give identities. Those with the annotation aadpodidentity.k8s.io/Federated get their tokens by federation in either case`)
	parsedVar(fs, &f.TenantID, flagFederationTenant, "", parseTenant, "tenant of identities with federation that do not name theirs")
	parsedVar(fs, &f.Authority, flagFederationAuthority, "", parseAuthority, "URL of the Entra authority of identities with federation that do not name theirs: one of Microsoft's or of --"+flagEntraAuthority+"; \"\" is the public cloud's")
}

// addTokenRequestFlags adds the flags of how the agent gets tokens of service accounts.
func (c *config) addTokenRequestFlags(fs *pflag.FlagSet) {
	fs.StringVar(&c.federation.audience, flagAudience, defaultAudience, "audience of the service account tokens that Entra exchanges; api://AzureADTokenExchangeUSGov and api://AzureADTokenExchangeChina in those clouds, "+bindingsAudience+" for AKS identity bindings")
	p := &c.upstream.TokenProxy
	parsedVar(fs, &p.URL, flagTokenProxy, "", parseTokenProxy, "URL of the token proxy of AKS identity bindings, to exchange service account tokens there and not at Entra (also the environment's "+envTokenProxy+")")
	fs.StringVar(&p.ServerName, flagTokenProxy+"-sni", "", "name that the token proxy is asked for by SNI, and that its certificate must have (also the environment's "+envTokenProxySNI+")")
	fs.StringVar(&p.CAFile, flagTokenProxy+"-ca", "", "file of the certificates that sign the token proxy's, read again when it changes; \"\" means the system's (also the environment's "+envTokenProxyCA+")")
	fs.BoolVar(&c.federation.asNode, "federation-as-node", false, "request service account tokens in the name of the agent's own node, so that its rights end with the node's pods: constrained impersonation, from Kubernetes 1.36, with the rights of deploy/federation/own-node.yaml")
}

// Variables of containers that the webhook for AKS identity bindings sets (Azure SDKs, azidentity's
// EnableAzureProxy).
const (
	envTokenProxy       = "AZURE_KUBERNETES_TOKEN_PROXY"
	envTokenProxySNI    = "AZURE_KUBERNETES_SNI_NAME"
	envTokenProxyCA     = "AZURE_KUBERNETES_CA_FILE"
	envTokenProxyCAData = "AZURE_KUBERNETES_CA_DATA"
)

func parseTokenProxy(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	return upstream.ParseTokenProxy(text)
}

func parseFederation(text string) (bool, error) {
	word, err := oneOf("off", "annotated")(text)
	return word == "annotated", err
}

func parseTenant(text string) (string, error) {
	if text != "" && !podresolver.ValidTenant(text) {
		return "", errors.New("want the ID of a tenant, or one of its domains")
	}
	return text, nil
}

// parseAuthority returns the URL of an authority.
func parseAuthority(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	host, err := upstream.ParseAuthority(text)
	return "https://" + host, err
}

// checkFederation checks what takes more than one flag to see.
func (c *config) checkFederation() error {
	if a := c.resolver.Federation.Authority; a != "" && !upstream.AllowedAuthority(strings.TrimPrefix(a, "https://"), c.upstream.Authorities) {
		return fmt.Errorf("--%s=%s is neither one of Microsoft's authorities nor named by --%s", flagFederationAuthority, a, flagEntraAuthority)
	}
	if err := c.completeTokenProxy(); err != nil {
		return err
	}
	if err := c.checkAudience(); err != nil {
		return err
	}
	switch proxy, audience := c.upstream.TokenProxy.URL != "", c.federation.audience; {
	case proxy && audience == defaultAudience:
		return fmt.Errorf("--%s (or %s) takes no tokens that are for Entra: set --%s=%s", flagTokenProxy, envTokenProxy, flagAudience, bindingsAudience)
	case !proxy && audience == bindingsAudience:
		return fmt.Errorf("--%s=%s needs --%s: Entra takes no such tokens", flagAudience, bindingsAudience, flagTokenProxy)
	}
	return nil
}

func (c *config) checkAudience() error {
	if c.federation.audience == "" {
		return errors.New("--" + flagAudience + " is empty: the API server would take that for its own audience")
	}
	return nil
}

// completeTokenProxy takes from the environment what the flags of the token proxy do not say.
func (c *config) completeTokenProxy() (err error) {
	p := &c.upstream.TokenProxy
	if p.URL == "" {
		if p.URL, err = parseTokenProxy(os.Getenv(envTokenProxy)); err != nil {
			return fmt.Errorf("the environment's %s: %w", envTokenProxy, err)
		}
	}
	p.ServerName = cmp.Or(p.ServerName, os.Getenv(envTokenProxySNI))
	if p.CAFile = cmp.Or(p.CAFile, os.Getenv(envTokenProxyCA)); p.CAFile == "" {
		p.CAData = os.Getenv(envTokenProxyCAData)
	}
	if p.URL == "" && *p != (upstream.TokenProxy{}) {
		return fmt.Errorf("--%s-sni and --%s-ca (or %s, %s, %s) are of no use without --%s (or %s)",
			flagTokenProxy, flagTokenProxy, envTokenProxySNI, envTokenProxyCA, envTokenProxyCAData, flagTokenProxy, envTokenProxy)
	}
	return nil
}
