package proxy

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// Reasons why a request is not served, beside those of podresolver. See there what they are for.
const (
	IdentityUnknownToIMDS  = "IdentityUnknownToIMDS"  // the node does not have the identity
	IMDSRefused            = "IMDSRefused"            // for another reason
	IMDSUnavailable        = "IMDSUnavailable"        // or it did not answer in time
	EntraRefused           = "EntraRefused"           // the service principal, or the resource
	EntraUnavailable       = "EntraUnavailable"       // or it did not answer in time
	FederationUnknown      = "FederationUnknown"      // the identity has no federated credential for the pod's service account
	CredentialUnusable     = "CredentialUnusable"     // the service principal's secret is missing or is not what it should be, or the service account's token cannot be requested
	Throttled              = "Throttled"              // by IMDS or Entra, or by this agent for the pod's own requests
	TooManyWaiting         = "TooManyWaiting"         // the pod's turn for a new token did not come in time
	TokensWithheldOnBridge = "TokensWithheldOnBridge" // pods can take each other's addresses
	RequestInvalid         = "RequestInvalid"         // the response says all that there is to say
)

// Reasons lists all that Reason and Refusal.Reason can be.
func Reasons() []string {
	return append(podresolver.Reasons(), IdentityUnknownToIMDS, IMDSRefused, IMDSUnavailable, EntraRefused, EntraUnavailable, FederationUnknown,
		CredentialUnusable, Throttled, TooManyWaiting, TokensWithheldOnBridge, RequestInvalid)
}

// Reason returns why a request with this error is not served.
func Reason(err error) string {
	if reason := podresolver.Reason(err); reason != "" {
		return reason
	}
	var failure *tokencache.Failure
	var httpErr *httpError
	switch {
	case errors.Is(err, ErrSource):
		return TokensWithheldOnBridge
	case errors.As(err, &failure):
		return reasonOfFailure(failure)
	case errors.As(err, &httpErr), errors.Is(err, tokencache.ErrKeyTooLong):
		return RequestInvalid
	default:
		return IMDSUnavailable
	}
}

func reasonOfFailure(f *tokencache.Failure) string {
	var answer *upstream.Error
	var credential *upstream.CredentialError
	var assertion *upstream.AssertionError
	fromEntra := errors.Is(f, upstream.ErrEntra) || errors.As(f, &answer) && answer.Source == "Entra"
	switch {
	case f.Class == tokencache.Throttled:
		return Throttled
	case errors.As(f, &credential):
		return CredentialUnusable
	case errors.Is(f, tokencache.ErrBusy):
		return TooManyWaiting
	case errors.As(f, &assertion) && assertion.NoMatch():
		return FederationUnknown
	case fromEntra && f.Class == tokencache.Refused:
		return EntraRefused
	case fromEntra:
		return EntraUnavailable
	case f.Class != tokencache.Refused:
		return IMDSUnavailable
	case answer != nil && answer.UnknownIdentity():
		return IdentityUnknownToIMDS
	default:
		return IMDSRefused
	}
}

// diagnose returns why a request is not served and what to do, and the error with what an operator
// can do, for the log: IMDS's words, which the pod is told, may read as if no identity were bound
// to it, and a binding or an identity may nearly match. It takes a look at every binding.
func (s *Server) diagnose(err error) (reason, fix string, _ error) {
	hint := s.cfg.Pods.Hint(err)
	reason = cmp.Or(hint.Reason, Reason(err))
	switch {
	case reason == IdentityUnknownToIMDS:
		err = fmt.Errorf("%w (bound, but IMDS does not know this identity on this node: assign it to the scale set (VM) or correct the AzureIdentity)", err)
	case hint.NearMisses != "":
		err = fmt.Errorf("%w; near misses: %s", err, hint.NearMisses)
	}
	return reason, cmp.Or(hint.Fix, Fix(reason)), err
}

// Fix returns what to do about a reason of this package; "" for podresolver's, whose
// Resolver.Explain says more.
func Fix(reason string) string {
	switch reason {
	case IdentityUnknownToIMDS:
		return "assign the identity to the node's scale set or virtual machine (az vmss identity assign), or correct the IDs of the AzureIdentity"
	case IMDSRefused:
		return "correct what IMDS names, mostly the resource that the application requests"
	case IMDSUnavailable:
		return "see whether the node reaches 169.254.169.254: docs/troubleshooting.md#when-imds-gives-no-tokens"
	case EntraRefused:
		return "correct what Entra names: the application, its credential, or the resource that is requested"
	case EntraUnavailable:
		return "see whether the node reaches the authority of the AzureIdentity"
	case FederationUnknown:
		return "create a federated credential with this issuer, subject and audience (az identity federated-credential create), or correct the client ID: docs/federation.md#errors"
	case CredentialUnusable:
		return "correct the secret that the AzureIdentity names, or the agent's right to read it: docs/service-principals.md#errors; or its right to request tokens of service accounts: docs/federation.md#the-right-to-request-tokens"
	case Throttled, TooManyWaiting:
		return "find the pod or program that requests too many tokens: docs/troubleshooting.md#why-does-my-pod-get-429"
	case TokensWithheldOnBridge:
		return "use a network plugin that gives each pod a link of its own, or take NET_RAW and NET_ADMIN from all pods and set --allow-network-plugin-kubenet"
	case RequestInvalid:
		return "correct the application's request, as the response says"
	default:
		return ""
	}
}
