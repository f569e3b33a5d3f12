package tokencache

import (
	"strconv"
	"unique"
)

// Key names one token: whose it is, and what it is good for. Two pods that may
// use the same identity share the entry. A Key holds no secret.
type Key struct {
	// ClientID of the identity, in lower case. Of a managed identity it names the
	// identity alone when set.
	ClientID string
	// ResourceID is the Azure resource ID of the managed identity, in lower
	// case; used where no ClientID is known.
	ResourceID string
	// Resource is the audience asked for, exactly as the caller spelled it: the
	// service echoes it, so another spelling is another answer.
	Resource string
	// Principal is the rest of what names an identity whose tokens Entra has; the zero
	// Handle where IMDS has them. It is a Handle to keep the Key of most tokens small.
	Principal unique.Handle[Principal]
}

// Principal is how an identity proves itself to Entra, and where.
type Principal struct {
	TenantID    string // whose token it is
	Authority   string // URL of the Entra endpoint, without a slash at its end
	Certificate bool   // it proves itself with a certificate, else with a client secret
	// SecretNamespace and SecretName name the Kubernetes Secret that holds the
	// client secret or certificate.
	SecretNamespace, SecretName string
	// ServiceAccount is whose token proves the identity instead, by federation.
	ServiceAccount ServiceAccount
}

// ServiceAccount names a Kubernetes service account.
type ServiceAccount struct {
	Namespace, Name string
	UID             string // "" if it is not known
}

// Federated reports whether a service account proves it.
func (p Principal) Federated() bool { return p.ServiceAccount.Name != "" }

// FromEntra returns Principal's value, and false if IMDS has the token.
func (k Key) FromEntra() (Principal, bool) {
	if k.Principal == (unique.Handle[Principal]{}) {
		return Principal{}, false
	}
	return k.Principal.Value(), true
}

func (k Key) tooLong() bool { return len(k.ClientID)+len(k.ResourceID)+len(k.Resource) > maxKey }

// String returns the key with each field quoted, so that no two keys share a
// string, whatever a caller put into Resource.
func (k Key) String() string {
	b := make([]byte, 0, len(k.ClientID)+len(k.ResourceID)+len(k.Resource)+8)
	b = strconv.AppendQuote(b, k.ClientID)
	b = append(b, ' ')
	b = strconv.AppendQuote(b, k.ResourceID)
	b = append(b, ' ')
	b = strconv.AppendQuote(b, k.Resource)
	if p, ok := k.FromEntra(); ok {
		for _, part := range []string{p.TenantID, p.Authority, strconv.FormatBool(p.Certificate), p.SecretNamespace, p.SecretName, p.ServiceAccount.Namespace, p.ServiceAccount.Name, p.ServiceAccount.UID} {
			b = append(b, ' ')
			b = strconv.AppendQuote(b, part)
		}
	}
	return string(b)
}
