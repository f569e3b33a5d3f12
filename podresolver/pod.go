package podresolver

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

var (
	// ErrUnknownAddress means that no pod of this node is known to have the address, after a
	// wait of Config.PodWait. One may appear: retry shortly.
	ErrUnknownAddress = errors.New("no pod on this node has this address")
	// ErrAmbiguousAddress means that several live pods claim the address. None of them gets
	// an identity until all but one are gone.
	ErrAmbiguousAddress = errors.New("several live pods claim this address")
	// ErrUnconfirmed means that the caller may not be the pod that has the address according
	// to the API server: the address may have been reused, and the event be late. See
	// Resolver.ResolveCaller. Retry shortly.
	ErrUnconfirmed = errors.New("the caller may not be the pod that the API server reports for this address")
	// ErrNoIdentity means that the pod may not use the requested identity, or any. Retrying
	// does not help until an object changes.
	ErrNoIdentity = errors.New("no identity for this pod")
	// ErrNotAssigned means that a binding gives the pod the identity, but MIC has not
	// assigned it yet. Retry shortly.
	ErrNotAssigned = errors.New("MIC has not assigned the identity to this pod yet")
	// ErrServiceAccount means that what the pod's service account gives it is not known yet: the
	// event of the service account is late. Retry shortly.
	ErrServiceAccount = errors.New("the pod's service account is not known yet")
	// ErrMultipleIdentities means that the pod has several identities and the request names
	// none of them, with Config.StrictSelection.
	ErrMultipleIdentities = errors.New("the pod has several identities and the request names none")
	// ErrNotSynced means that not all resources have been listed yet.
	ErrNotSynced = errors.New("the agent has not synced with the API server yet")
	// ErrStale means that the API server has sent nothing for longer than
	// Config.MaxStaleness.
	ErrStale = errors.New("pod and identity data is stale")
)

// Selector is how a request names an identity, with at most one field. The zero value names
// none.
type Selector struct {
	ClientID   string
	ResourceID string
	ObjectID   string
}

// Identity is an identity that a pod may use: an AzureIdentity, or one that an annotation of the
// pod's service account names.
type Identity struct {
	Namespace, Name string // of the AzureIdentity or, if Annotated, of the service account
	Type            aadpodidentity.IdentityType
	ClientID        string // lower case
	ResourceID      string // lower case
	Binding         string // name of the AzureIdentityBinding that gives it

	Principal *Principal // if Entra has the tokens; nil if IMDS has them
}

// Principal is how an identity proves itself to Entra: a service principal (type 1 or 2) with a
// Secret, a federated identity with a token of the pod's service account. It does not change.
type Principal struct {
	TenantID           string
	AuxiliaryTenantIDs []string // a request gets a token of each of these, too
	Authority          string   // URL of the authority that issues its tokens, from adEndpoint
	// SecretNamespace and SecretName name the Secret with the client secret, or with the
	// certificate if Certificate is true.
	SecretNamespace, SecretName string
	Certificate                 bool
	ServiceAccount              ServiceAccount // the zero value for a service principal
	Annotated                   bool           // annotations of the service account give the identity
}

// Annotated reports whether annotations of the pod's service account give the identity, and not an
// AzureIdentity.
func (id Identity) Annotated() bool { return id.Principal != nil && id.Principal.Annotated }

// defaultAuthority is the Authority of an AzureIdentity without adEndpoint: Entra in the
// public cloud.
const defaultAuthority = "https://login.microsoftonline.com"

// Pod is a pod of this node and the decision for it. It does not change: a change of an object
// that affects the pod makes a new Pod.
type Pod struct {
	Namespace, Name string
	UID             string
	// Started is when one of its containers last started, in whole seconds; zero if none has.
	Started time.Time

	info       *podInfo
	exception  string     // name of the exception that applies, or ""
	identities []Identity // that the pod may use, the default first
	defaults   []Identity // those of identities that a request without a selector may get
	pending    []Identity // that it may use once MIC has assigned them
	unusable   string     // why it may not use other bound identities; "" if there are none
	account    string     // the same for those of its service account
	late       error      // wraps ErrServiceAccount, if that is not known
	refusal    error      // wraps ErrNoIdentity; if defaults and pending are empty, unless late is why
	strict     bool       // Config.StrictSelection
	foreign    bool       // see Foreign
}

// String is the pod's namespace and name.
func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// Addresses returns the addresses that the API server names for the pod, of which it may have lost
// some. Do not change them.
func (p *Pod) Addresses() []netip.Addr { return p.info.addrs }

// Exception returns the name of the AzurePodIdentityException that applies to the pod, or "".
// Requests of an excepted pod are passed through.
func (p *Pod) Exception() string { return p.exception }

// Foreign reports whether objects of another namespace have a say in the pod's identities, so that
// errors may name them, and quote what their authors wrote: they are not for the pod's namespace.
func (p *Pod) Foreign() bool { return p.foreign }

// Identities returns the identities that the pod may use, the default first.
func (p *Pod) Identities() iter.Seq[Identity] { return slices.Values(p.identities) }

// Identity returns the identity that a request gets. IDs are compared case-insensitively. A
// selector that names none gets the pod's default, which is the identity of its oldest
// binding, or ErrMultipleIdentities. Other errors are ErrNotAssigned, or wrap ErrNoIdentity and
// tell an operator the reason.
func (p *Pod) Identity(want Selector) (Identity, error) {
	usable := p.usable(want)
	if id := want.selectFrom(usable); id != nil {
		if p.strict && want == (Selector{}) && len(usable) > 1 {
			return Identity{}, ErrMultipleIdentities
		}
		return *id, nil
	}
	if id := want.selectFrom(p.pending); id != nil {
		return Identity{}, fmt.Errorf("%w: AzureIdentity %s/%s", ErrNotAssigned, id.Namespace, id.Name)
	}
	switch {
	case p.late != nil && (want != (Selector{}) || p.refusal == nil):
		return Identity{}, p.late
	case len(usable) > 0:
		return Identity{}, &refusalError{p, p.notAmong(usable, want)}
	case len(p.pending) > 0:
		return Identity{}, &refusalError{p, p.notAmong(p.pending, want)}
	default:
		return Identity{}, &refusalError{p, p.refusal}
	}
}

// usable are the identities that a request with a selector chooses from.
func (p *Pod) usable(want Selector) []Identity {
	if want == (Selector{}) {
		return p.defaults
	}
	return p.identities
}

// refusalError wraps ErrNoIdentity, with the pod for Hint.
type refusalError struct {
	pod *Pod
	error
}

// Unwrap returns the error that wraps ErrNoIdentity.
func (e *refusalError) Unwrap() error { return e.error }

// notAmong is the error for a requested identity that is not among those of the pod.
func (p *Pod) notAmong(has []Identity, want Selector) error {
	var ids []string
	for _, id := range has[:min(len(has), maxDescribed)] {
		ids = append(ids, id.String())
	}
	if more := len(has) - len(ids); more > 0 {
		ids = append(ids, fmt.Sprintf("and %d more", more))
	}
	err := fmt.Errorf("%w: none of those bound to it has the requested %s: %s", ErrNoIdentity, want, strings.Join(ids, "; "))
	for _, why := range []string{p.unusable, p.account} {
		if why != "" {
			err = fmt.Errorf("%w; %s", err, why)
		}
	}
	return err
}

// String describes the selector for an error. Long values are cut.
func (want Selector) String() string {
	switch {
	case want.ObjectID != "":
		return fmt.Sprintf("object ID %.100q", want.ObjectID)
	case want.ClientID != "":
		return fmt.Sprintf("client ID %.100q", want.ClientID)
	case want.ResourceID != "":
		return fmt.Sprintf("resource ID %.300q", want.ResourceID)
	default:
		return "default"
	}
}

// selectFrom returns the named identity, or the first if none is named; nil if there is no such.
func (want Selector) selectFrom(from []Identity) *Identity {
	// An AzureIdentity has no object ID. The old NMI ignored the parameter, and returned the
	// default identity for any object ID.
	if want.ObjectID != "" {
		return nil
	}
	for i := range from {
		id := &from[i]
		if want == (Selector{}) ||
			want.ClientID != "" && strings.EqualFold(id.ClientID, want.ClientID) ||
			want.ResourceID != "" && strings.EqualFold(id.ResourceID, want.ResourceID) {
			return id
		}
	}
	return nil
}
