package upstream

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/podidentity/nmi/tokencache"
)

// ErrNoSecret is wrapped by the errors of Config.Secret where asking again changes
// nothing: there is no such Secret, or the agent may not read it.
var ErrNoSecret = errors.New("it cannot be read")

// CredentialError means that the agent cannot prove to be a service principal, so
// that Entra was not asked. It is for operators: what it says is not for pods. It
// quotes nothing that is in the Secret but the names of keys.
type CredentialError struct {
	Namespace, Name string // of the Secret
	Err             error  // what is wrong with it

	class tokencache.Class
}

func (e *CredentialError) Error() string {
	return fmt.Sprintf("secret %s/%s: %v", e.Namespace, e.Name, e.Err)
}

// Unwrap returns Err.
func (e *CredentialError) Unwrap() error { return e.Err }

// Class is Refused where somebody has to change something, and Unavailable where
// the API server could not be asked.
func (e *CredentialError) Class() tokencache.Class { return e.class }

func refusedCredential(p tokencache.Principal, err error) error {
	return &CredentialError{Namespace: p.SecretNamespace, Name: p.SecretName, Err: err, class: tokencache.Refused}
}

// secretError is what Config.Secret's error means.
func secretError(p tokencache.Principal, err error) error {
	e := &CredentialError{Namespace: p.SecretNamespace, Name: p.SecretName, Err: err, class: tokencache.Unavailable}
	if errors.Is(err, ErrNoSecret) {
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

// clientSecretIn finds a client secret: under its name, or under the only name
// there is, as the old NMI did (it took any of several).
func clientSecretIn(data map[string][]byte) (string, error) {
	value, ok := data[clientSecretKey]
	name := clientSecretKey
	if !ok {
		switch names := namesOf(data); len(names) {
		case 0:
			return "", errors.New("it has no keys; the client secret belongs under " + clientSecretKey)
		case 1:
			name = names[0]
			value = data[name]
		default:
			return "", fmt.Errorf("of its keys %s none is %s, under which the client secret belongs", strings.Join(names, ", "), clientSecretKey)
		}
	}
	// Files end with a newline, and kubectl --from-file takes it along. Entra
	// makes client secrets itself, and none ends so.
	secret := strings.TrimRight(string(value), "\r\n")
	if secret == "" {
		return "", fmt.Errorf("its key %s is empty", name)
	}
	return secret, nil
}

// namesOf are a Secret's keys, sorted, and no more of them than a line can take.
func namesOf(data map[string][]byte) []string {
	const most = 10
	names := slices.Sorted(maps.Keys(data))
	if len(names) > most {
		names = append(names[:most:most], fmt.Sprintf("and %d more", len(names)-most))
	}
	return names
}
