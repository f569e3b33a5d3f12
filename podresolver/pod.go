package podresolver

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

var (
	// ErrUnknownAddress means that no pod of this node is known to hold the
	// address, although its event was waited for. The pod may be about to
	// appear: ask again shortly.
	ErrUnknownAddress = errors.New("no pod of this node is known by this address")
	// ErrAmbiguousAddress means that several live pods claim the address. None
	// of them gets an identity until all but one are gone.
	ErrAmbiguousAddress = errors.New("several live pods claim this address")
	// ErrUnconfirmed means that the caller may be another pod than the one that the API
	// server names for its address: the address may have been reused, and the API server
	// be late with the news. See Resolver.ResolveCaller. Ask again shortly.
	ErrUnconfirmed = errors.New("the caller may be another pod than the one known by this address")
	// ErrNoIdentity means that the pod may not use the identity it asked for,
	// or any. Asking again changes nothing until somebody changes a binding.
	ErrNoIdentity = errors.New("no identity for this pod")
	// ErrNotAssigned means that a binding gives the pod the identity, and MIC has
	// not assigned it yet: ask again shortly.
	ErrNotAssigned = errors.New("MIC has not assigned the identity to this pod yet")
	// ErrSeveral means that the pod has several identities and named none of them,
	// with Config.StrictSelection.
	ErrSeveral = errors.New("the pod has several identities, and named none")
	// ErrNotSynced means that nothing can be decided yet: the API server has not told of
	// all that decisions need.
	ErrNotSynced = errors.New("the agent is not in sync with the API server yet")
	// ErrStale means that the API server has not been heard of for longer than
	// Config.MaxStaleness.
	ErrStale = errors.New("what is known of pods and identities is too old")
)

// Selector is the identity that a request names; at most one field is set. The
// zero value names none.
type Selector struct {
	ClientID   string
	ResourceID string
	ObjectID   string
}

// Identity is an AzureIdentity that a pod may use.
type Identity struct {
	Namespace, Name string // of the AzureIdentity
	Type            aadpodidentity.IdentityType
	ClientID        string // lower case
	ResourceID      string // lower case
	Binding         string // name of the AzureIdentityBinding that gives it

	Principal *Principal // the rest of a service principal; nil for a managed identity
}

// Principal is what an AzureIdentity of type 1 or 2 says beyond its client ID. It
// never changes.
type Principal struct {
	TenantID           string
	AuxiliaryTenantIDs []string // tokens of these are given too
	Authority          string   // where its tokens come from, as adEndpoint says
	// SecretNamespace and SecretName name the Secret that holds what the service
	// principal proves itself with: a certificate, or else a client secret.
	SecretNamespace, SecretName string
	Certificate                 bool
}

// defaultAuthority is the Authority of an AzureIdentity without adEndpoint:
// Entra's of the public cloud.
const defaultAuthority = "https://login.microsoftonline.com"

// Pod is a pod of this node and what has been decided for it. Pods are made
// anew when anything changes that bears on them, and never change.
type Pod struct {
	Namespace, Name string
	UID             string
	// Started is when the latest of its containers started, in whole seconds; zero if
	// none has.
	Started time.Time

	row        *podRow
	exception  string     // name of the exception that applies, or ""
	identities []Identity // that the pod may use, the default first
	pending    []Identity // that it may use once MIC has assigned them
	unusable   string     // why the pod may not use others that bindings name; "" if there are none
	refusal    error      // said when both are empty; wraps ErrNoIdentity
	strict     bool       // Config.StrictSelection
}

// String is the pod's namespace and name.
func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// Exception returns the name of the AzurePodIdentityException that applies to
// the pod, or "". What an excepted pod sends is not the agent's business.
func (p *Pod) Exception() string { return p.exception }

// Identities returns the identities that the pod may use, the default first.
func (p *Pod) Identities() iter.Seq[Identity] { return slices.Values(p.identities) }

// Identity decides which identity the pod gets. IDs are compared without regard
// to case. A selector that names none gets the pod's default, the first bound, or is
// ErrSeveral. The error wraps ErrNoIdentity and says, to an operator, why; or
// ErrNotAssigned.
func (p *Pod) Identity(want Selector) (Identity, error) {
	if id, ok := want.pick(p.identities); ok {
		if p.strict && want == (Selector{}) && len(p.identities) > 1 {
			return Identity{}, ErrSeveral
		}
		return id, nil
	}
	if id, ok := want.pick(p.pending); ok {
		return Identity{}, fmt.Errorf("%w: AzureIdentity %s/%s", ErrNotAssigned, id.Namespace, id.Name)
	}
	switch {
	case len(p.identities) > 0:
		return Identity{}, &refused{p, p.notAmong(p.identities, "bound to it", want)}
	case len(p.pending) > 0:
		return Identity{}, &refused{p, p.notAmong(p.pending, "that bindings give to it", want)}
	default:
		return Identity{}, &refused{p, p.refusal}
	}
}

// refused is an error that wraps ErrNoIdentity, and knows which pod it is about.
type refused struct {
	pod *Pod
	error
}

// Unwrap makes it an ErrNoIdentity.
func (e *refused) Unwrap() error { return e.error }

// notAmong refuses an identity that is not among those that the pod has. It may be one
// that the pod cannot use.
func (p *Pod) notAmong(has []Identity, which string, want Selector) error {
	var ids []string
	for _, id := range has {
		ids = append(ids, id.String())
	}
	err := fmt.Errorf("%w: none of the %d %s has the %s that it asked for: %s", ErrNoIdentity, len(has), which, want, some(ids))
	if p.unusable != "" {
		err = fmt.Errorf("%w; %s", err, p.unusable)
	}
	return err
}

// String names what is asked for, as far as it is worth reading.
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

// pick returns the identity that is named, or the first if none is.
func (want Selector) pick(from []Identity) (Identity, bool) {
	// An AzureIdentity does not carry an object ID. The old NMI ignored the
	// parameter, and so handed out the default for any.
	if want.ObjectID != "" {
		return Identity{}, false
	}
	for _, id := range from {
		if want == (Selector{}) ||
			want.ClientID != "" && strings.EqualFold(id.ClientID, want.ClientID) ||
			want.ResourceID != "" && strings.EqualFold(id.ResourceID, want.ResourceID) {
			return id, true
		}
	}
	return Identity{}, false
}
