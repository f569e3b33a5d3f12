// Package upstream is where tokens come from.
//
// The life of a managed identity's token here: the key becomes a request to the instance
// metadata service (IMDS); an azcore pipeline sends it, and retries where the service
// asks for that, each try with a slot of the limiter; the answer is checked field by field
// before it is returned. A refusal is returned as an *Error with the service's own words.
//
// A service principal's token comes from Entra: the authority must be one that secrets may
// be sent to; the Secret is read; a credential made from it requests the token. An unusable
// Secret is returned as a *CredentialError. A federated identity's token comes from there, too,
// for a token of the pod's service account instead of a Secret.
//
// The same connections carry the requests that are passed through, see RoundTrip.
package upstream

import (
	"cmp"
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/podidentity/nmi/tokencache"
	"github.com/podidentity/nmi/tokencache/limiter"
)

// IMDS allows a virtual machine 20 requests for tokens a second and 5 at once
// (learn.microsoft.com, "Azure Instance Metadata Service", Rate limiting). The difference
// is for the node's own programs.
const (
	DefaultPerSecond = 18
	DefaultAtOnce    = 4
)

// Config says where IMDS is, what Entra needs, and how much may be asked of both.
type Config struct {
	// IMDS is the service's base URL, for example http://169.254.169.254:80.
	// Scheme and host count, nothing else.
	IMDS *url.URL
	// UserAgent is sent with each token request.
	UserAgent string

	// PerSecond and AtOnce bound the requests for tokens to IMDS; 0 means DefaultPerSecond and
	// DefaultAtOnce. PerSecond also bounds, apart from those, the fetches from each authority of
	// Entra, of which as many may be in flight.
	PerSecond, AtOnce int

	// Secret reads a Kubernetes Secret, whenever a token of a service principal is
	// fetched. Its error wraps ErrNoSecret where asking again changes nothing. nil
	// reads none.
	Secret func(ctx context.Context, namespace, name string) (map[string][]byte, error)
	// ServiceAccountToken returns a new token of a service account, for Entra, whenever one of
	// a federated identity is fetched. Its error wraps ErrNoServiceAccountToken where asking
	// again changes nothing. nil returns none.
	ServiceAccountToken func(ctx context.Context, account tokencache.ServiceAccount) (string, error)
	// TokenProxy exchanges those tokens in Entra's place; the zero value is none.
	TokenProxy TokenProxy
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
	// Not entra's, so that fetches which hang there delay none from IMDS.
	imdsLimiter             slotLimiter
	imdsCounts, entraCounts counts
	perSecond, atOnce       int         // see Share
	shared                  atomic.Bool // see Share

	outage    outage
	spellings spellings

	// For requests that are passed through; see RoundTrip.
	passThrough, passThroughTokens *limiter.Limiter
	bodies                         *bodyBudget
}

// New returns an Upstream. It opens no connection yet.
func New(cfg Config) *Upstream {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	perSecond, atOnce := cmp.Or(cfg.PerSecond, DefaultPerSecond), cmp.Or(cfg.AtOnce, DefaultAtOnce)
	transport := &http.Transport{
		// No Proxy: IMDS must be reached directly, whatever the environment
		// says (learn.microsoft.com, "Azure Instance Metadata Service", Proxies).
		DialContext:            (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		DisableCompression:     true, // answers are passed through as they are
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxHeader,
	}
	return &Upstream{
		base:        &url.URL{Scheme: cfg.IMDS.Scheme, Host: cfg.IMDS.Host},
		userAgent:   cfg.UserAgent,
		transport:   transport,
		entra:       newEntra(cfg, perSecond),
		imdsLimiter: limiter.New(perSecond, atOnce),
		perSecond:   perSecond, atOnce: atOnce,
		pipeline:  newPipeline(transport),
		outage:    outage{log: cfg.Logger},
		spellings: spellings{logger: cfg.Logger, logged: make(map[string]bool)},

		passThrough:       limiter.New(0, passThroughSlots),
		passThroughTokens: limiter.New(0, passThroughTokenSlots),
		bodies:            newBodyBudget(maxBodies),
	}
}

// Unavailable returns an error while IMDS gives no tokens: since when, and why. It is
// learnt from fetches, and so as late as they are.
func (u *Upstream) Unavailable() error { return u.outage.err() }

// PausedUntil returns until when IMDS throttles this node (429); the zero time or one in
// the past if it does not.
func (u *Upstream) PausedUntil() time.Time { return u.imdsLimiter.PausedUntil() }

// PauseUntil asks IMDS for no token until then, an hour from now at most. It shortens no
// pause.
func (u *Upstream) PauseUntil(until time.Time) { u.imdsLimiter.PauseUntil(until) }

// Share halves the limits of Config until Unshare, for another agent of the node to have the
// other half. At least one request at a time stays. It returns when no more requests to IMDS are
// in flight than that, or when ctx ends; none is for longer than 10 s.
func (u *Upstream) Share(ctx context.Context) {
	u.shared.Store(true)
	u.setLimits(max(1, u.perSecond/2), max(1, u.atOnce/2))
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	_ = u.imdsLimiter.Settle(ctx) // another agent may begin in any case
}

// Unshare restores the limits.
func (u *Upstream) Unshare() {
	u.shared.Store(false)
	u.setLimits(u.perSecond, u.atOnce)
}

// Limits returns what Config allows at IMDS: requests a second, and at once; the first also for
// each authority of Entra. Half of both while Shared.
func (u *Upstream) Limits() (perSecond, atOnce int) { return u.perSecond, u.atOnce }

// Shared reports whether the limits are halved now.
func (u *Upstream) Shared() bool { return u.shared.Load() }

func (u *Upstream) setLimits(perSecond, atOnce int) {
	u.imdsLimiter.SetLimits(perSecond, atOnce)
	u.entra.limiters.setLimit(perSecond)
}

// Close drops the idle connections, and what is remembered of Secrets.
func (u *Upstream) Close() {
	u.transport.CloseIdleConnections()
	u.entra.transport.CloseIdleConnections()
	u.entra.tokenProxy.close()
	u.entra.certificates.close()
}
