package podresolver

import (
	"fmt"
	"strings"
)

// DenyList lists identities that no pod gets, whatever is bound to it: those of the node, such
// as the kubelet's. The zero value denies nothing.
//
// An AzureIdentity may name an identity by either of its IDs. IMDS returns the client ID with
// a token, see [Resolver.CheckToken], but not the resource ID. So a client ID denies an
// identity under both names; a resource ID does not deny an AzureIdentity that has the client
// ID alone.
type DenyList struct {
	ClientIDs, ResourceIDs []string // in lower case
}

// ParseDenyList parses client IDs and resource IDs, in any case.
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

// reason is why the list denies an AzureIdentity, "" if it does not. IDs in other spellings are
// refused before, by checkClientID and checkResourceID.
func (d DenyList) reason(in *identityInfo) string {
	switch {
	case containsFold(d.ClientIDs, in.clientID):
		return fmt.Sprintf("has client ID %s, denied by --deny-identity", in.clientID)
	case containsFold(d.ResourceIDs, in.resourceID):
		return fmt.Sprintf("has resource ID %s, denied by --deny-identity", in.resourceID)
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

// errDeniedToken means that only the token tells that its identity is denied.
var errDeniedToken = fmt.Errorf("%w: the token is", ErrNoIdentity)

// CheckToken returns an error that wraps [ErrNoIdentity] if Config.Deny denies the client ID of
// a token. It must be called for every token before it is returned, cached ones included.
func (r *Resolver) CheckToken(clientID string) error {
	switch denied := r.cfg.Deny; {
	case len(denied.ClientIDs) == 0:
		return nil
	case containsFold(denied.ClientIDs, clientID):
		return fmt.Errorf("%w for client ID %s, denied by --deny-identity", errDeniedToken, clientID)
	case !isGUID(clientID):
		return fmt.Errorf("%w for client ID %.100q, which is not a GUID and cannot be compared with --deny-identity", errDeniedToken, clientID)
	}
	return nil
}
