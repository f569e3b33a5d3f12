package podresolver

import (
	"fmt"
	"strings"
)

// DenyList names identities that bindings cannot give to a pod: those that are the
// node's own, such as the kubelet's. The zero value denies nothing.
//
// An AzureIdentity may name the same identity by its other ID. The answer of the
// metadata service says whose client ID a token has, see [Resolver.CheckToken], and
// does not say its resource ID. So a client ID denies an identity however it is named;
// a resource ID alone does not deny an AzureIdentity that gives the client ID alone.
type DenyList struct {
	ClientIDs, ResourceIDs []string // in lower case
}

// ParseDenyList reads client IDs and resource IDs, in any case. Its error names the one
// that is neither.
func ParseDenyList(ids []string) (DenyList, error) {
	var d DenyList
	for _, text := range ids {
		switch id := strings.ToLower(strings.TrimSpace(text)); {
		case isGUID(id):
			d.ClientIDs = append(d.ClientIDs, id)
		case isIdentityPath(id):
			d.ResourceIDs = append(d.ResourceIDs, id)
		default:
			return DenyList{}, fmt.Errorf("%q is neither a client ID nor a resource ID: use a GUID, such as 11111111-2222-3333-4444-555555555555, or %s", text, identityForm)
		}
	}
	return d, nil
}

// reason says why the list denies an AzureIdentity, "" if it does not. Its IDs have been
// checked: those in another spelling cannot be compared, and cannot be used at all.
func (d DenyList) reason(in *identityRow) string {
	switch {
	case containsFold(d.ClientIDs, in.clientID):
		return fmt.Sprintf("has client ID %s, withheld by --deny-identity", in.clientID)
	case containsFold(d.ResourceIDs, in.resourceID):
		return fmt.Sprintf("has resource ID %s, withheld by --deny-identity", in.resourceID)
	}
	return ""
}

func containsFold(list []string, id string) bool {
	for _, denied := range list {
		if strings.EqualFold(denied, id) {
			return true
		}
	}
	return false
}

// CheckToken returns an error that wraps [ErrNoIdentity] if no pod may have a token of
// this client ID, whichever ID the AzureIdentity gave. It is for every token that is
// about to be handed out, cached ones included.
func (r *Resolver) CheckToken(clientID string) error {
	switch denied := r.cfg.Deny; {
	case len(denied.ClientIDs) == 0:
		return nil
	case containsFold(denied.ClientIDs, clientID):
		return fmt.Errorf("%w: the token is for client ID %s, withheld by --deny-identity", ErrNoIdentity, clientID)
	case !isGUID(clientID):
		return fmt.Errorf("%w: the token is for client ID %.100q, which is not a GUID and cannot be compared with --deny-identity", ErrNoIdentity, clientID)
	}
	return nil
}
