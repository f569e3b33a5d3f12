package upstream

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"software.sslmate.com/src/go-pkcs12"
)

// certificate is the content of a PKCS12 file: a private key, and certificates, the first of
// which is the key's.
type certificate struct {
	key   *rsa.PrivateKey
	chain []*x509.Certificate
}

const (
	// maxCertificates is how many Secrets' certificates are cached; those of 64 files of
	// maxPKCS12 take some 12 MB.
	maxCertificates = 64
	// certificateIdleTimeout is how long an unused certificate stays cached. Tokens of
	// service principals are refreshed within the hour.
	certificateIdleTimeout = 2 * time.Hour
	// maxRSABits bounds RSA keys: a signature can take minutes, and cannot be
	// interrupted. Entra's certificates have 2,048 or 4,096 bits.
	maxRSABits = 8192
)

// certificates decodes PKCS12 files, one at a time, and caches the result for the last
// version of each Secret, errors included: deriving the keys takes up to seconds of CPU time.
// The Secret itself is read for each token.
type certificates struct {
	decoding chan struct{} // holds one element while a file is decoded
	decode   func(map[string][]byte) (certificate, error)

	mu       sync.Mutex // guards bySecret
	bySecret *lru.Cache[string, *decoded]
}

// decoded is the result for one version of a Secret.
type decoded struct {
	version     [sha256.Size]byte
	certificate certificate
	err         error
	idle        *time.Timer // removes it from the cache
}

func newCertificates() *certificates {
	bySecret, err := lru.NewWithEvict(maxCertificates, func(_ string, d *decoded) { d.idle.Stop() })
	if err != nil { // only for a size below 1
		panic(err)
	}
	return &certificates{decoding: make(chan struct{}, 1), decode: certificateIn, bySecret: bySecret}
}

// get returns the certificate in a Secret. It returns when ctx ends, although the decoder
// cannot be interrupted: it continues, for the seconds that maxIterations allows, and its
// result is cached for the next call.
func (c *certificates) get(ctx context.Context, secret string, data map[string][]byte) (certificate, error) {
	version := secretVersion(data)
	if d := c.lookup(secret, version); d != nil {
		return d.certificate, d.err
	}
	select {
	case c.decoding <- struct{}{}:
	case <-ctx.Done():
		return certificate{}, ctx.Err()
	}
	if d := c.lookup(secret, version); d != nil { // decoded while this call waited
		<-c.decoding
		return d.certificate, d.err
	}
	done := make(chan *decoded, 1)
	go func() {
		defer func() { <-c.decoding }()
		d := &decoded{version: version}
		d.certificate, d.err = c.decodeSafely(data)
		c.store(secret, d)
		done <- d
	}()
	select {
	case d := <-done:
		return d.certificate, d.err
	case <-ctx.Done():
		return certificate{}, ctx.Err()
	}
}

// decodeSafely turns a panic of the decoder into an error.
func (c *certificates) decodeSafely(data map[string][]byte) (got certificate, err error) {
	defer func() {
		if p := recover(); p != nil {
			got, err = certificate{}, fmt.Errorf("decoding %s panicked: %v", certificateKey, p)
		}
	}()
	return c.decode(data)
}

func (c *certificates) lookup(secret string, version [sha256.Size]byte) *decoded {
	c.mu.Lock()
	defer c.mu.Unlock()
	d, ok := c.bySecret.Get(secret)
	if !ok || d.version != version {
		return nil
	}
	d.idle.Reset(certificateIdleTimeout)
	return d
}

func (c *certificates) store(secret string, d *decoded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bySecret.Remove(secret)
	d.idle = time.AfterFunc(certificateIdleTimeout, func() { c.forget(secret) })
	c.bySecret.Add(secret, d)
}

func (c *certificates) forget(secret string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bySecret.Remove(secret)
}

func (c *certificates) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bySecret.Purge()
}

// secretVersion returns a hash of the keys that a certificate is read from.
func secretVersion(data map[string][]byte) [sha256.Size]byte {
	file, password := sha256.Sum256(data[certificateKey]), sha256.Sum256(data[passwordKey])
	return sha256.Sum256(append(file[:], password[:]...))
}

// certificateIn decodes the certificate and private key in a Secret's PKCS12 file.
func certificateIn(data map[string][]byte) (certificate, error) {
	file, ok := data[certificateKey]
	switch {
	case !ok && len(data) == 0:
		return certificate{}, errors.New("has no keys; want " + certificateKey + " with a PKCS12 file")
	case !ok:
		return certificate{}, fmt.Errorf("has keys %s; want %s with a PKCS12 file", strings.Join(keyNames(data), ", "), certificateKey)
	case len(file) == 0:
		return certificate{}, fmt.Errorf("key %s is empty", certificateKey)
	case bytes.HasPrefix(bytes.TrimSpace(file), []byte("-----BEGIN ")):
		return certificate{}, fmt.Errorf("key %s is PEM; want a PKCS12 file (openssl pkcs12 -export makes one)", certificateKey)
	}
	password := string(data[passwordKey])
	key, chain, err := decodePKCS12(file, password)
	switch {
	case errors.Is(err, pkcs12.ErrIncorrectPassword) && password == "":
		return certificate{}, fmt.Errorf("the PKCS12 file in key %s has a password; want it in key %s", certificateKey, passwordKey)
	case errors.Is(err, pkcs12.ErrIncorrectPassword):
		return certificate{}, fmt.Errorf("wrong password in key %s for the PKCS12 file in key %s", passwordKey, certificateKey)
	case err != nil: // "private key missing" and the like
		return certificate{}, fmt.Errorf("key %s is not a PKCS12 file with one certificate and its private key: %w", certificateKey, err)
	}
	signer, ok := key.(*rsa.PrivateKey)
	if !ok {
		return certificate{}, fmt.Errorf("the private key in %s is not an RSA key, the only kind that Entra accepts", certificateKey)
	}
	if err := checkKey(signer); err != nil {
		return certificate{}, err
	}
	leaf := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return signer.PublicKey.Equal(c.PublicKey) })
	if leaf < 0 {
		return certificate{}, fmt.Errorf("no certificate in %s belongs to the private key in it", certificateKey)
	}
	chain[0], chain[leaf] = chain[leaf], chain[0]
	return certificate{key: signer, chain: chain}, nil
}

func checkKey(key *rsa.PrivateKey) error {
	if bits := key.N.BitLen(); bits > maxRSABits {
		return fmt.Errorf("the RSA key in %s has %d bits; the limit is %d", certificateKey, bits, maxRSABits)
	}
	return nil
}

// validAt returns an error if the certificate is not valid at now.
func (c certificate) validAt(now time.Time) error {
	switch leaf := c.chain[0]; {
	case now.After(leaf.NotAfter):
		return fmt.Errorf("the certificate in %s expired at %s", certificateKey, leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the certificate in %s is not valid before %s; check the node's clock", certificateKey, leaf.NotBefore.UTC().Format(time.RFC3339))
	default:
		return nil
	}
}
