// Package upstream is where tokens come from.
//
// The way of a managed identity's token through here: the key becomes a request to
// the instance metadata service (IMDS), an azcore pipeline sends it and tries again
// where the service asks for that, each time after a turn of the limiter, and the
// answer is checked field by field before anyone may keep it. What the service
// refuses comes back as an *Error with the service's own words.
//
// A service principal's token comes from Entra: the authority must be one that
// secrets may be sent to, the Secret is read, a credential is made of it and asks.
// What the Secret lacks comes back as a *CredentialError.
//
// The same connections carry the requests that are passed on unprocessed, see
// RoundTrip.
package upstream

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
)

// Config says where IMDS is, what Entra needs, and who asks.
type Config struct {
	// IMDS is the service's base URL, for example http://169.254.169.254:80.
	// Scheme and host count, nothing else.
	IMDS *url.URL
	// UserAgent is sent with each token request.
	UserAgent string

	// Secret reads a Kubernetes Secret, whenever a token of a service principal is
	// fetched. Its error wraps ErrNoSecret where asking again changes nothing. nil
	// reads none.
	Secret func(ctx context.Context, namespace, name string) (map[string][]byte, error)
	// Authorities are hosts, as ParseAuthority returns them, that secrets may be
	// sent to beside Microsoft's own.
	Authorities []string
	// Roots are whom Entra's certificate may be from; nil means the system's.
	Roots *x509.CertPool

	Logger *slog.Logger // nil means slog.Default
}

// Upstream asks IMDS, and Entra for service principals. It is safe for concurrent use.
type Upstream struct {
	base      *url.URL
	userAgent string
	transport *http.Transport
	pipeline  runtime.Pipeline
	entra     *entra
	outage    outage
	spellings spellings

	// For what is passed on; see RoundTrip.
	passing, passingTokens *slots
	held                   *held
}

// New returns an Upstream. It opens no connection yet.
func New(cfg Config) *Upstream {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	transport := &http.Transport{
		// No Proxy: IMDS must be reached directly, whatever the environment
		// says (learn.microsoft.com, "Azure Instance Metadata Service", Proxies).
		DialContext:            (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		DisableCompression:     true, // what is passed on is passed on as it is
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxHeader,
	}
	return &Upstream{
		base:      &url.URL{Scheme: cfg.IMDS.Scheme, Host: cfg.IMDS.Host},
		userAgent: cfg.UserAgent,
		transport: transport,
		entra:     newEntra(cfg),
		pipeline:  newPipeline(transport),
		outage:    outage{log: cfg.Logger},
		spellings: spellings{to: cfg.Logger, told: make(map[string]bool)},

		passing:       newSlots(passingSlots),
		passingTokens: newSlots(tokenSlots),
		held:          newHeld(maxHeld),
	}
}

// Unavailable returns an error while IMDS gives no tokens: since when, and why. It is
// learnt from fetches, and so as late as they are.
func (u *Upstream) Unavailable() error { return u.outage.err() }

// Close drops the idle connections, and what is remembered of Secrets.
func (u *Upstream) Close() {
	u.transport.CloseIdleConnections()
	u.entra.transport.CloseIdleConnections()
	u.entra.certificates.close()
}
