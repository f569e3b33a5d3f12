package podresolver

import (
	"fmt"
	"strings"
	"unicode"
)

// Names of the flags that limit decisions, for texts that tell an operator why.
const (
	DenyIdentityFlag        = "deny-identity"
	ExceptionNamespacesFlag = "exception-namespaces"
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
		case isClientID(id):
			d.ClientIDs = append(d.ClientIDs, id)
		case isResourceID(id):
			d.ResourceIDs = append(d.ResourceIDs, id)
		default:
			return DenyList{}, fmt.Errorf("%q is neither a client ID nor a resource ID: use a GUID, such as 11111111-2222-3333-4444-555555555555, or /subscriptions/<ID>/resourceGroups/<group>/providers/Microsoft.ManagedIdentity/userAssignedIdentities/<name>", text)
		}
	}
	return d, nil
}

// reason says why the list denies an AzureIdentity, "" if it does not. An ID in a
// spelling that Azure does not use is denied as well, since it cannot be compared and
// whoever reads it at Azure may be more tolerant: .NET's Guid.Parse takes braces and
// leaves hyphens out, and CVE-2022-23551 was a spelling of a path.
func (d DenyList) reason(in *identityRow) string {
	switch {
	case d.empty():
		return ""
	case d.deniesClientID(in.clientID):
		return fmt.Sprintf("has client ID %s, withheld by --%s", in.clientID, DenyIdentityFlag)
	case containsFold(d.ResourceIDs, in.resourceID):
		return fmt.Sprintf("has resource ID %s, withheld by --%s", in.resourceID, DenyIdentityFlag)
	case in.clientID != "" && !isClientID(in.clientID):
		return fmt.Sprintf("has client ID %.100q, which is not a GUID and cannot be compared with --%s", in.clientID, DenyIdentityFlag)
	case in.resourceID != "" && !isResourceID(in.resourceID):
		return fmt.Sprintf("has resource ID %.300q, which is malformed and cannot be compared with --%s", in.resourceID, DenyIdentityFlag)
	}
	return ""
}

func (d DenyList) empty() bool { return len(d.ClientIDs)+len(d.ResourceIDs) == 0 }

func (d DenyList) deniesClientID(id string) bool { return containsFold(d.ClientIDs, id) }

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
	case denied.deniesClientID(clientID):
		return fmt.Errorf("%w: the token is for client ID %s, withheld by --%s", ErrNoIdentity, clientID, DenyIdentityFlag)
	case !isClientID(clientID):
		return fmt.Errorf("%w: the token is for client ID %.100q, which is not a GUID and cannot be compared with --%s", ErrNoIdentity, clientID, DenyIdentityFlag)
	}
	return nil
}

// isClientID reports whether an ID is a GUID with hyphens, 8-4-4-4-12.
func isClientID(id string) bool {
	if len(id) != 36 {
		return false
	}
	for i := range len(id) {
		c := id[i]
		switch {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
		default:
			return false
		}
	}
	return true
}

// isResourceID reports whether an ID is a path of names under /subscriptions, as Azure
// spells it. Names have letters, digits and "-_.()", and do not end with a period
// (Microsoft, "Naming rules and restrictions for Azure resources", resourceGroups; those
// of the other parts are narrower): none is a dot segment, empty or percent-encoded.
func isResourceID(id string) bool {
	const root = "/subscriptions/"
	if len(id) <= len(root) || !strings.EqualFold(id[:len(root)], root) {
		return false
	}
	for name := range strings.SplitSeq(id[1:], "/") {
		odd := func(c rune) bool {
			return !unicode.IsLetter(c) && !unicode.IsDigit(c) && !strings.ContainsRune("-_.()", c)
		}
		if name == "" || strings.HasSuffix(name, ".") || strings.ContainsFunc(name, odd) {
			return false
		}
	}
	return true
}
