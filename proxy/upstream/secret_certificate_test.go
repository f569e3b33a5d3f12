package upstream

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"software.sslmate.com/src/go-pkcs12"

	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/tokencache"
	"github.com/podidentity/nmi/tokencache/limiter"
)

// counting returns a count of the files that c decodes.
func counting(c *certificates) *atomic.Int32 {
	var n atomic.Int32
	decode := c.decode
	c.decode = func(data map[string][]byte) (certificate, error) {
		n.Add(1)
		return decode(data)
	}
	return &n
}

func TestCertificateIsDecodedOncePerSecretVersion(t *testing.T) {
	cert, key := pair()
	file := func(word string) map[string][]byte {
		b, err := pkcs12.Modern.Encode(key, cert, nil, word)
		require.NoError(t, err)
		return map[string][]byte{"certificate": b, "password": []byte(word)}
	}
	p := newPrincipals(t, nil)
	n := counting(p.Upstream.entra.certificates)
	fetch := func() error {
		_, err := p.Token(t.Context(), asking(p.key(byCertificate)))
		return err
	}
	p.secrets["sp"] = file(password)
	for range 3 {
		require.NoError(t, fetch())
	}
	assert.EqualValues(t, 1, n.Load())
	assert.Equal(t, 3, p.reads, "the Secret is read for each")
	p.secrets["sp"] = file("another")
	require.NoError(t, fetch())
	assert.EqualValues(t, 2, n.Load(), "a changed Secret counts at once")
	p.secrets["sp"]["password"] = []byte("wrong")
	for range 3 {
		require.ErrorContains(t, fetch(), "wrong password in key password")
	}
	assert.EqualValues(t, 3, n.Load(), "errors are cached too")

	p.err = fmt.Errorf("%w: there is no such secret", ErrNoSecret)
	require.Error(t, fetch())
	assert.Zero(t, p.Upstream.entra.certificates.bySecret.Len(), "nothing is cached of a Secret that is gone")
}

func TestCachedCertificateExpires(t *testing.T) {
	cert, key := entratest.NewCertificate(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	got := certificate{key: key, chain: []*x509.Certificate{cert}}
	require.NoError(t, got.validAt(time.Now()))
	require.ErrorContains(t, got.validAt(time.Now().Add(2*time.Hour)), "expired")
	require.ErrorContains(t, got.validAt(time.Now().Add(-2*time.Hour)), "not valid before")
}

func TestCachedCertificatesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCertificates()
		c.decode = func(map[string][]byte) (certificate, error) { return certificate{}, errors.New("no") }
		n := counting(c)
		for i := range 2 * maxCertificates {
			_, err := c.get(t.Context(), fmt.Sprint(i), nil)
			require.Error(t, err)
		}
		assert.Equal(t, maxCertificates, c.bySecret.Len())
		last := fmt.Sprint(2*maxCertificates - 1)
		for range 3 {
			time.Sleep(certificateIdleTimeout - time.Second)
			_, err := c.get(t.Context(), last, nil)
			require.Error(t, err)
		}
		assert.EqualValues(t, 2*maxCertificates, n.Load(), "what is in use is kept")
		assert.Equal(t, 1, c.bySecret.Len(), "and nothing else")
		time.Sleep(certificateIdleTimeout)
		synctest.Wait()
		assert.Zero(t, c.bySecret.Len())
	})
}

func TestConcurrentFetchesDecodeOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCertificates()
		defer c.close()
		c.decode = func(map[string][]byte) (certificate, error) { time.Sleep(time.Second); return certificate{}, nil }
		n := counting(c)
		var all sync.WaitGroup
		begin := time.Now()
		for i := range 100 {
			all.Go(func() {
				_, err := c.get(t.Context(), fmt.Sprint(i%2), nil)
				assert.NoError(t, err)
			})
		}
		all.Wait()
		assert.EqualValues(t, 2, n.Load())
		assert.Equal(t, 2*time.Second, time.Since(begin), "one after the other")
	})
}

func TestDecoderPanics(t *testing.T) {
	c := newCertificates()
	defer c.close()
	c.decode = func(map[string][]byte) (certificate, error) { panic("boom") }
	_, err := c.get(t.Context(), "s", nil)
	require.ErrorContains(t, err, "boom")
	c.decode = func(map[string][]byte) (certificate, error) { return certificate{}, nil }
	_, err = c.get(t.Context(), "t", nil)
	require.NoError(t, err)
}

// Decoding takes no slot, and delays neither callers that leave nor Close.
func TestDecodingTakesNoSlot(t *testing.T) {
	p := newPrincipals(t, nil)
	p.secrets["slow"] = map[string][]byte{"certificate": []byte("x")}
	began, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	p.Upstream.entra.certificates.decode = func(map[string][]byte) (certificate, error) {
		close(began)
		<-release
		return certificate{}, errors.New("no")
	}
	p.limits(limiter.New(1, 1))
	cache := tokencache.New(p.Token, tokencache.Config{})
	slow := p.key(func(k *tokencache.Principal) { k.Certificate, k.SecretName = true, "slow" })
	var waiting sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for i, wait := range []context.Context{t.Context(), ctx} {
		k := slow
		k.Resource = fmt.Sprint(i)
		waiting.Go(func() {
			_, err := cache.Get(wait, k, netip.Addr{})
			assert.Error(t, err)
		})
	}
	<-began
	_, err := cache.Get(t.Context(), p.key(nil), netip.Addr{})
	require.NoError(t, err, "the only slot is free")
	cancel()
	cache.Close()
	waiting.Wait()
}

// It cannot be interrupted, neither by a deadline nor by SIGTERM.
func TestEndlessCertificateIsRefused(t *testing.T) {
	cert, key := pair()
	file, err := pkcs12.Modern.Encode(key, cert, nil, password)
	require.NoError(t, err)
	p := newPrincipals(t, nil)
	p.secrets["sp"] = map[string][]byte{"certificate": withMAC(t, file, endless), "password": []byte(password)}
	cache := tokencache.New(p.Token, tokencache.Config{})
	_, err = cache.Get(t.Context(), p.key(byCertificate), netip.Addr{})
	var failure *tokencache.Failure
	require.ErrorAs(t, err, &failure)
	assert.Equal(t, tokencache.Refused, failure.Class)
	assert.ErrorContains(t, err, "secret shop/sp: key certificate is not a PKCS12 file with one certificate and its private key: it asks for 2147483648 iterations")
	cache.Close()
}

func TestRSAKeyLength(t *testing.T) {
	n := new(big.Int).Lsh(big.NewInt(1), maxRSABits)
	require.ErrorContains(t, checkKey(&rsa.PrivateKey{PublicKey: rsa.PublicKey{N: n}}), "has 8193 bits")
	require.NoError(t, checkKey(&rsa.PrivateKey{PublicKey: rsa.PublicKey{N: n.Rsh(n, 1)}}))
}
