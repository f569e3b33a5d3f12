package upstream

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/podidentity/nmi/tokencache"
)

// ErrNoSecret is wrapped by errors of Config.Secret that a retry does not change: the Secret
// does not exist, or the agent may not read it.
var ErrNoSecret = errors.New("it cannot be read")

// CredentialError means that the agent has no usable credential for an identity, and sent nothing
// to Entra. Its text is for operators, not for pods, and quotes nothing from a Secret but the
// names of its keys.
type CredentialError struct {
	Object string // "secret shop/name" or "service account shop/name"
	Secret bool   // it is a Secret: who may read the pod need not know its name and keys
	Err    error  // what is wrong with it

	class tokencache.Class
}

func (e *CredentialError) Error() string {
	return fmt.Sprintf("%s: %v", e.Object, e.Err)
}

// Unwrap returns Err.
func (e *CredentialError) Unwrap() error { return e.Err }

// Class is Unavailable if the API server did not answer, and Refused if the configuration is
// wrong.
func (e *CredentialError) Class() tokencache.Class { return e.class }

func refusedCredential(p tokencache.Principal, err error) error {
	return &CredentialError{Object: objectOf(p), Secret: !p.Federated(), Err: err, class: tokencache.Refused}
}

// objectOf names what proves an identity.
func objectOf(p tokencache.Principal) string {
	if p.Federated() {
		return fmt.Sprintf("service account %s/%s", p.ServiceAccount.Namespace, p.ServiceAccount.Name)
	}
	return fmt.Sprintf("secret %s/%s", p.SecretNamespace, p.SecretName)
}

// credentialError classifies an error of Config.Secret or Config.ServiceAccountToken.
func credentialError(p tokencache.Principal, err error) error {
	e := &CredentialError{Object: objectOf(p), Secret: !p.Federated(), Err: err, class: tokencache.Unavailable}
	if errors.Is(err, ErrNoSecret) || errors.Is(err, ErrNoServiceAccountToken) {
		e.class = tokencache.Refused
	}
	return e
}

// Keys of a Secret.
const (
	clientSecretKey = "clientsecret"
	certificateKey  = "certificate"
	passwordKey     = "password"
)

// clientSecretIn returns the client secret: the value of its key, or of the only key, as in
// the old NMI (which took any of several).
func clientSecretIn(data map[string][]byte) (string, error) {
	value, ok := data[clientSecretKey]
	name := clientSecretKey
	if !ok {
		switch names := keyNames(data); len(names) {
		case 0:
			return "", errors.New("has no keys; want " + clientSecretKey)
		case 1:
			name = names[0]
			value = data[name]
		default:
			return "", fmt.Errorf("has keys %s; want %s", strings.Join(names, ", "), clientSecretKey)
		}
	}
	// Text files end with a newline, and kubectl --from-file keeps it. Entra generates
	// client secrets, and none ends with one.
	secret := strings.TrimRight(string(value), "\r\n")
	if secret == "" {
		return "", fmt.Errorf("key %s is empty", name)
	}
	return secret, nil
}

// keyNames returns the names of a Secret's keys, sorted, and only the first few of many.
func keyNames(data map[string][]byte) []string {
	const most = 10
	names := slices.Sorted(maps.Keys(data))
	if len(names) > most {
		names = append(names[:most:most], fmt.Sprintf("and %d more", len(names)-most))
	}
	return names
}
