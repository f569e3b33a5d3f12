package upstream

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/podidentity/nmi/tokencache"
)

// ErrEntra means that Entra could not be asked, or that its answer was neither a
// token nor a refusal. Asking again may help.
var ErrEntra = errors.New("no token from Entra")

const sourceEntra = "Entra"

// entra gets the tokens of service principals. Of Secrets it keeps nothing between two
// fetches but decoded certificates; a changed Secret counts from the next one.
type entra struct {
	certificates *certificates
	secret       func(ctx context.Context, namespace, name string) (map[string][]byte, error)
	accountToken func(ctx context.Context, account tokencache.ServiceAccount) (string, error)
	hosts        map[string]bool // that secrets may be sent to
	limiters     entraLimiters
	userAgent    string
	transport    *http.Transport
	tokenProxy   *tokenProxy // for federated identities; nil for none
}

func newEntra(cfg Config, perSecond int) *entra {
	hosts := hostsOf(cfg.Authorities)
	e := &entra{
		certificates: newCertificates(),
		secret:       cfg.Secret, accountToken: cfg.ServiceAccountToken, hosts: hosts, limiters: newEntraLimiters(hosts, perSecond), userAgent: cfg.UserAgent,
		transport:  newEntraTransport(&tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.Roots}),
		tokenProxy: newTokenProxy(cfg.TokenProxy),
	}
	if e.secret == nil {
		e.secret = func(context.Context, string, string) (map[string][]byte, error) {
			return nil, fmt.Errorf("%w: this agent reads no secrets", ErrNoSecret)
		}
	}
	if e.accountToken == nil {
		e.accountToken = func(context.Context, tokencache.ServiceAccount) (string, error) {
			return "", fmt.Errorf("%w: this agent requests none", ErrNoServiceAccountToken)
		}
	}
	return e
}

func newEntraTransport(cfg *tls.Config) *http.Transport {
	return &http.Transport{
		// Unlike IMDS, Entra is on the Internet, which some nodes reach through
		// a proxy only.
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 3 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:     cfg,
		TLSHandshakeTimeout: 5 * time.Second,
		ForceAttemptHTTP2:   true,
		// Entra and AKS's proxy speak HTTP/2, and need one. Who may write an AzureIdentity could have
		// many made to each authority where something in between does not.
		MaxConnsPerHost:       8,
		MaxIdleConnsPerHost:   8,
		MaxIdleConns:          16,
		IdleConnTimeout:       90 * time.Second,
		ResponseHeaderTimeout: 10 * time.Second,
	}
}

// token gets one token, in these steps:
//
//  1. The authority must be one that secrets may be sent to.
//  2. A service principal's Secret is read, in a slot of its own kind, which is free again before a
//     certificate in it is decoded: that may take seconds, and delays no other pod.
//  3. The fetch waits for one slot at Entra, for all of the following.
//  4. The token of a federated identity's service account is requested. Pods can cause as many of
//     these requests as of those to Entra, so they take the same turns.
//  5. Entra is asked.
//
// The error is an *Error (Entra refused), perhaps in an *AssertionError, a *CredentialError (Entra
// could not even be asked), or wraps ErrEntra.
func (e *entra) token(ctx context.Context, f *fetch, key tokencache.Key, p tokencache.Principal) (*tokencache.Token, error) {
	host, err := e.allowed(p.Authority)
	if err != nil {
		return nil, refusedCredential(p, err)
	}
	var transport http.RoundTripper = e.transport
	turns := e.limiters[host]
	proxied := p.Federated() && e.tokenProxy != nil
	if proxied {
		transport, turns = e.tokenProxy, e.limiters[tokenProxyHost]
	}
	var proof proof
	if !p.Federated() {
		if proof, err = e.secretProof(ctx, f, p); err != nil {
			return nil, err
		}
	}
	f.turnTo(turns)
	release, err := f.slot(ctx)
	if err != nil {
		return nil, err
	}
	defer release(0) // Entra throttles one tenant or application, not all
	if p.Federated() {
		if proof.assertion, err = e.assertion(ctx, p.ServiceAccount); err != nil {
			return nil, credentialError(p, err)
		}
	}
	x := &exchange{
		client: &http.Client{
			Transport: transport,
			// The request holds the secret, or stands for it.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		hosts: e.hosts, userAgent: e.userAgent, proxied: proxied,
	}
	credential, err := newCredential(key.ClientID, p, proof, optionsFor(host, x))
	if err != nil {
		return nil, refusedCredential(p, err)
	}
	began := time.Now()
	got, err := credential.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{scopeOf(key.Resource)}})
	now := time.Now()
	if err != nil {
		err = proof.assertion.explain(x.explain(ctx, err, now))
	}
	f.counts.record(ctx, now.Sub(began), err)
	if err != nil {
		return nil, err
	}
	return x.read(got, key, now)
}

// scopeOf is what the v2.0 endpoint calls a resource. A slash at the resource's end
// stays, and so is doubled: the token's audience is the resource to the letter
// (learn.microsoft.com, "Scopes and permissions", Trailing slash and .default).
func scopeOf(resource string) string { return resource + "/.default" }

// proof is what an identity proves itself with: a service account's token, a client secret, or
// else a certificate.
type proof struct {
	assertion    *assertion // nil for a service principal
	clientSecret string
	certificate  certificate
}

// secretProof reads the Secret. The error is a *CredentialError, or says why there was no slot.
func (e *entra) secretProof(ctx context.Context, f *fetch, p tokencache.Principal) (got proof, err error) {
	f.turnTo(e.limiters[secretReads])
	release, err := f.slot(ctx)
	if err != nil {
		return proof{}, err
	}
	name := p.SecretNamespace + "/" + p.SecretName
	data, err := e.secret(ctx, p.SecretNamespace, p.SecretName)
	release(0)
	if err != nil {
		e.certificates.forget(name) // the Secret may have been deleted
		return proof{}, credentialError(p, err)
	}
	if !p.Certificate {
		if got.clientSecret, err = clientSecretIn(data); err != nil {
			return proof{}, refusedCredential(p, err)
		}
		return got, nil
	}
	got.certificate, err = e.certificates.get(ctx, name, data)
	switch {
	case err != nil && ctx.Err() != nil:
		return proof{}, credentialError(p, fmt.Errorf("decoding its certificate: %w", err))
	case err != nil:
		return proof{}, refusedCredential(p, err)
	}
	if err := got.certificate.validAt(time.Now()); err != nil {
		return proof{}, refusedCredential(p, err)
	}
	return got, nil
}

// newCredential makes what asks for tokens. It is made
// anew for each fetch: it has a cache of its own, which would answer a refresh with
// the token that is to be replaced.
func newCredential(clientID string, p tokencache.Principal, proof proof, options azcore.ClientOptions) (azcore.TokenCredential, error) {
	// Instance discovery asks login.microsoft.com whether an authority is one of
	// Microsoft's. Here a list of our own has said so already, and it says no
	// more of authorities that the operator named.
	const noDiscovery = true
	if proof.assertion != nil {
		return azidentity.NewClientAssertionCredential(p.TenantID, clientID, func(context.Context) (string, error) { return proof.assertion.token, nil },
			&azidentity.ClientAssertionCredentialOptions{ClientOptions: options, DisableInstanceDiscovery: noDiscovery})
	}
	if p.Certificate {
		return azidentity.NewClientCertificateCredential(p.TenantID, clientID, proof.certificate.chain, proof.certificate.key,
			&azidentity.ClientCertificateCredentialOptions{ClientOptions: options, DisableInstanceDiscovery: noDiscovery})
	}
	return azidentity.NewClientSecretCredential(p.TenantID, clientID, proof.clientSecret,
		&azidentity.ClientSecretCredentialOptions{ClientOptions: options, DisableInstanceDiscovery: noDiscovery})
}

func optionsFor(host string, x *exchange) azcore.ClientOptions {
	return azcore.ClientOptions{
		Cloud:     cloud.Configuration{ActiveDirectoryAuthorityHost: "https://" + host + "/"},
		Transport: x,
		Telemetry: policy.TelemetryOptions{Disabled: true},
		Retry: policy.RetryOptions{
			MaxRetries:    2,
			TryTimeout:    5 * time.Second,
			RetryDelay:    200 * time.Millisecond,
			MaxRetryDelay: 2 * time.Second,
			// Not 429, as with IMDS: the callers are told to wait instead.
			StatusCodes: []int{
				http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout,
			},
		},
	}
}

// explain returns why there is no token.
func (x *exchange) explain(ctx context.Context, err error, now time.Time) error {
	switch {
	case x.err != nil:
		return fmt.Errorf("%w: %w", ErrEntra, x.err)
	case x.status != 0 && x.status != http.StatusOK:
		return x.refusal(now)
	case x.token: // its text may quote the token
		return fmt.Errorf("%w: the response is not the JSON of a token", ErrEntra)
	case ctx.Err() != nil: // before or between the requests, which the credential's text alone tells
		return fmt.Errorf("%w: %w", ErrEntra, ctx.Err())
	default:
		return fmt.Errorf("%w: token endpoint discovery failed: %.300s", ErrEntra, err.Error())
	}
}

// read checks the token and the other fields of the answer. Its errors never quote the
// token.
func (x *exchange) read(got azcore.AccessToken, key tokencache.Key, now time.Time) (*tokencache.Token, error) {
	var in struct {
		ExpiresIn    seconds `json:"expires_in"`
		ExtExpiresIn seconds `json:"ext_expires_in"`
		TokenType    string  `json:"token_type"`
	}
	life := got.ExpiresOn.Sub(now)
	switch {
	case json.Unmarshal(x.body, &in) != nil:
		return nil, fmt.Errorf("%w: malformed number in the response", ErrEntra)
	case !isBearerToken(got.Token) || got.Token == "":
		return nil, fmt.Errorf("%w: the token is not a bearer token (RFC 6750, section 2.1)", ErrEntra)
	case !strings.EqualFold(in.TokenType, "Bearer"):
		return nil, fmt.Errorf("%w: the token is of type %.40q, not Bearer", ErrEntra, in.TokenType)
	case life <= 0 || life > maxLifetime:
		return nil, fmt.Errorf("%w: implausible token expiry %s; check the node's clock", ErrEntra, got.ExpiresOn.UTC().Format(time.RFC3339))
	}
	token := &tokencache.Token{
		AccessToken: got.Token, ClientID: key.ClientID, Resource: key.Resource, TokenType: "Bearer",
		NotBefore: now, ExpiresOn: got.ExpiresOn, ExtExpiresOn: got.ExpiresOn, RefreshOn: got.RefreshOn,
	}
	token.ExpiresIn, _ = in.ExpiresIn.duration(maxLifetime)
	if ext, ok := in.ExtExpiresIn.duration(maxLifetime); ok && now.Add(ext).After(token.ExpiresOn) {
		token.ExtExpiresOn = now.Add(ext)
	}
	return token, nil
}
