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

// certificate is what a PKCS12 file comes to: the private key, and the certificates, of
// which the first is the key's.
type certificate struct {
	key   *rsa.PrivateKey
	chain []*x509.Certificate
}

const (
	// maxCertificates is how many Secrets' certificates are remembered; 64 files of
	// maxPKCS12 come to some 12 MB.
	maxCertificates = 64
	// keepCertificate is for how long one is remembered that nobody asks for. A token of
	// a service principal is refreshed within the hour.
	keepCertificate = 2 * time.Hour
	// maxRSABits is the longest RSA key that is used: nothing can stop a signature that
	// takes minutes. Entra's have 2,048 or 4,096.
	maxRSABits = 8192
)

// certificates decodes PKCS12 files, one at a time, and remembers what the last version
// of each Secret came to, be it an error: to derive the keys takes up to seconds of a
// core. The Secret itself is read anew for each token.
type certificates struct {
	decoding chan struct{} // holds one element while a file is decoded
	decode   func(map[string][]byte) (certificate, error)

	mu       sync.Mutex // guards bySecret
	bySecret *lru.Cache[string, *decoded]
}

// decoded is what a version of a Secret came to.
type decoded struct {
	version     [sha256.Size]byte
	certificate certificate
	err         error
	unused      *time.Timer // forgets it
}

func newCertificates() *certificates {
	bySecret, err := lru.NewWithEvict(maxCertificates, func(_ string, d *decoded) { d.unused.Stop() })
	if err != nil { // only for a size below 1
		panic(err)
	}
	return &certificates{decoding: make(chan struct{}, 1), decode: certificateIn, bySecret: bySecret}
}

// of returns the certificate in a Secret. It returns when ctx ends, although nothing can
// stop the decoder: that goes on, for the seconds that maxIterations allows, and its
// result is for the next who asks.
func (c *certificates) of(ctx context.Context, secret string, data map[string][]byte) (certificate, error) {
	version := versionOf(data)
	if d := c.known(secret, version); d != nil {
		return d.certificate, d.err
	}
	select {
	case c.decoding <- struct{}{}:
	case <-ctx.Done():
		return certificate{}, ctx.Err()
	}
	if d := c.known(secret, version); d != nil { // another was waited for
		<-c.decoding
		return d.certificate, d.err
	}
	done := make(chan *decoded, 1)
	go func() {
		defer func() { <-c.decoding }()
		d := &decoded{version: version}
		d.certificate, d.err = c.decodeSafely(data)
		c.remember(secret, d)
		done <- d
	}()
	select {
	case d := <-done:
		return d.certificate, d.err
	case <-ctx.Done():
		return certificate{}, ctx.Err()
	}
}

// decodeSafely makes a panic of the decoder an error of the file.
func (c *certificates) decodeSafely(data map[string][]byte) (got certificate, err error) {
	defer func() {
		if p := recover(); p != nil {
			got, err = certificate{}, fmt.Errorf("decoding %s panicked: %v", certificateKey, p)
		}
	}()
	return c.decode(data)
}

func (c *certificates) known(secret string, version [sha256.Size]byte) *decoded {
	c.mu.Lock()
	defer c.mu.Unlock()
	d, ok := c.bySecret.Get(secret)
	if !ok || d.version != version {
		return nil
	}
	d.unused.Reset(keepCertificate)
	return d
}

func (c *certificates) remember(secret string, d *decoded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bySecret.Remove(secret)
	d.unused = time.AfterFunc(keepCertificate, func() { c.forget(secret) })
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

// versionOf tells the versions of what a certificate is made of apart.
func versionOf(data map[string][]byte) [sha256.Size]byte {
	file, password := sha256.Sum256(data[certificateKey]), sha256.Sum256(data[passwordKey])
	return sha256.Sum256(append(file[:], password[:]...))
}

// certificateIn reads a certificate with its private key out of the PKCS12 file in
// a Secret.
func certificateIn(data map[string][]byte) (certificate, error) {
	file, ok := data[certificateKey]
	switch {
	case !ok && len(data) == 0:
		return certificate{}, errors.New("it has no keys; the PKCS12 file belongs under " + certificateKey)
	case !ok:
		return certificate{}, fmt.Errorf("of its keys %s none is %s, under which the PKCS12 file belongs", strings.Join(namesOf(data), ", "), certificateKey)
	case len(file) == 0:
		return certificate{}, fmt.Errorf("its key %s is empty", certificateKey)
	case bytes.HasPrefix(bytes.TrimSpace(file), []byte("-----BEGIN ")):
		return certificate{}, fmt.Errorf("its key %s is PEM, and must be a PKCS12 file (openssl pkcs12 -export makes one)", certificateKey)
	}
	password := string(data[passwordKey])
	key, chain, err := decodePKCS12(file, password)
	switch {
	case errors.Is(err, pkcs12.ErrIncorrectPassword) && password == "":
		return certificate{}, fmt.Errorf("the PKCS12 file in %s has a password, and there is none under %s", certificateKey, passwordKey)
	case errors.Is(err, pkcs12.ErrIncorrectPassword):
		return certificate{}, fmt.Errorf("the password under %s is not that of the PKCS12 file in %s", passwordKey, certificateKey)
	case err != nil: // "private key missing" and the like
		return certificate{}, fmt.Errorf("%s is not a PKCS12 file with one certificate and its private key: %w", certificateKey, err)
	}
	signer, ok := key.(*rsa.PrivateKey)
	if !ok {
		return certificate{}, fmt.Errorf("the private key in %s is not an RSA key, and Entra takes no other", certificateKey)
	}
	if err := checkKey(signer); err != nil {
		return certificate{}, err
	}
	own := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return signer.PublicKey.Equal(c.PublicKey) })
	if own < 0 {
		return certificate{}, fmt.Errorf("no certificate in %s belongs to the private key in it", certificateKey)
	}
	chain[0], chain[own] = chain[own], chain[0]
	return certificate{key: signer, chain: chain}, nil
}

func checkKey(key *rsa.PrivateKey) error {
	if bits := key.N.BitLen(); bits > maxRSABits {
		return fmt.Errorf("the RSA key in %s has %d bits, and may have %d", certificateKey, bits, maxRSABits)
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
