package upstream

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"software.sslmate.com/src/go-pkcs12"
)

// certificateIn reads a certificate with its private key out of the PKCS12 file in
// a Secret. The certificate that the key belongs to is the first it returns.
func certificateIn(data map[string][]byte, now time.Time) (chain []*x509.Certificate, key crypto.PrivateKey, err error) {
	file, ok := data[certificateKey]
	switch {
	case !ok && len(data) == 0:
		return nil, nil, errors.New("it has no keys; the PKCS12 file belongs under " + certificateKey)
	case !ok:
		return nil, nil, fmt.Errorf("of its keys %s none is %s, under which the PKCS12 file belongs", strings.Join(namesOf(data), ", "), certificateKey)
	case len(file) == 0:
		return nil, nil, fmt.Errorf("its key %s is empty", certificateKey)
	case bytes.HasPrefix(bytes.TrimSpace(file), []byte("-----BEGIN ")):
		return nil, nil, fmt.Errorf("its key %s is PEM, and must be a PKCS12 file (openssl pkcs12 -export makes one)", certificateKey)
	}
	key, leaf, others, err := decodePKCS12(file, string(data[passwordKey]))
	if err != nil {
		return nil, nil, err
	}
	signer, ok := key.(*rsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("the private key in %s is not an RSA key, and Entra takes no other", certificateKey)
	}
	chain = append([]*x509.Certificate{leaf}, others...)
	own := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return signer.PublicKey.Equal(c.PublicKey) })
	if own < 0 {
		return nil, nil, fmt.Errorf("no certificate in %s belongs to the private key in it", certificateKey)
	}
	chain[0], chain[own] = chain[own], chain[0]
	switch leaf = chain[0]; {
	case now.After(leaf.NotAfter):
		return nil, nil, fmt.Errorf("the certificate in %s expired at %s", certificateKey, leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return nil, nil, fmt.Errorf("the certificate in %s is not valid before %s; check the node's clock", certificateKey, leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	return chain, key, nil
}

// decodePKCS12 tries a password as it is, and then without the newline that it may
// have from a file.
func decodePKCS12(file []byte, password string) (key any, leaf *x509.Certificate, others []*x509.Certificate, err error) {
	key, leaf, others, err = pkcs12.DecodeChain(file, password)
	if trimmed := strings.TrimRight(password, "\r\n"); errors.Is(err, pkcs12.ErrIncorrectPassword) && trimmed != password {
		key, leaf, others, err = pkcs12.DecodeChain(file, trimmed)
	}
	switch {
	case err == nil:
		return key, leaf, others, nil
	case errors.Is(err, pkcs12.ErrIncorrectPassword) && password == "":
		return nil, nil, nil, fmt.Errorf("the PKCS12 file in %s has a password, and there is none under %s", certificateKey, passwordKey)
	case errors.Is(err, pkcs12.ErrIncorrectPassword):
		return nil, nil, nil, fmt.Errorf("the password under %s is not that of the PKCS12 file in %s", passwordKey, certificateKey)
	default: // "private key missing" and the like
		return nil, nil, nil, fmt.Errorf("%s is not a PKCS12 file with one certificate and its private key: %w", certificateKey, err)
	}
}
