package upstream

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"software.sslmate.com/src/go-pkcs12"

	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/tokencache"
)

func TestClientSecretIn(t *testing.T) {
	many := make(map[string][]byte)
	for i := range 12 {
		many[fmt.Sprintf("key-%02d", i)] = []byte(clientSecret)
	}
	for name, tc := range map[string]struct {
		data map[string][]byte
		err  string
	}{
		"under its name":               {map[string][]byte{"clientsecret": []byte(clientSecret), "other": []byte("x")}, ""},
		"the only key":                 {map[string][]byte{"password": []byte(clientSecret)}, ""},
		"with a file's newline":        {map[string][]byte{"clientsecret": []byte(clientSecret + "\n")}, ""},
		"with a Windows file's":        {map[string][]byte{"clientsecret": []byte(clientSecret + "\r\n")}, ""},
		"several, without its name":    {map[string][]byte{"b": []byte(clientSecret), "a": []byte(clientSecret)}, "has keys a, b; want clientsecret"},
		"many, without its name":       {many, "key-09, and 2 more; want clientsecret"},
		"no keys":                      {nil, "has no keys; want clientsecret"},
		"empty":                        {map[string][]byte{"clientsecret": nil}, "key clientsecret is empty"},
		"a newline alone":              {map[string][]byte{"x": []byte("\n")}, "key x is empty"},
		"an empty one is not replaced": {map[string][]byte{"clientsecret": nil, "other": []byte("x")}, "key clientsecret is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := clientSecretIn(tc.data)
			if tc.err == "" {
				require.NoError(t, err)
				assert.Equal(t, clientSecret, got)
				return
			}
			require.ErrorContains(t, err, tc.err)
			assert.NotContains(t, err.Error(), clientSecret)
		})
	}
}

func TestCertificateIn(t *testing.T) {
	now := time.Now()
	certificate, key := pair()
	encode := func(key any, certificate *x509.Certificate, others ...*x509.Certificate) []byte {
		file, err := pkcs12.Modern.Encode(key, certificate, others, password)
		require.NoError(t, err)
		return file
	}
	expired, expiredKey := entratest.NewCertificate(now.Add(-2*time.Hour), now.Add(-time.Hour))
	early, earlyKey := entratest.NewCertificate(now.Add(time.Hour), now.Add(2*time.Hour))
	trust, err := pkcs12.Modern.EncodeTrustStore([]*x509.Certificate{certificate}, password)
	require.NoError(t, err)
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "curve"}, NotAfter: now.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &curve.PublicKey, curve)
	require.NoError(t, err)
	onCurve, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	plain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})

	good := encode(key, certificate)
	with := func(file []byte, word string) map[string][]byte {
		return map[string][]byte{"certificate": file, "password": []byte(word)}
	}
	for name, tc := range map[string]struct {
		data map[string][]byte
		err  string
	}{
		"as it should be":                  {with(good, password), ""},
		"with a file's newline":            {with(good, password+"\n"), ""},
		"its own certificate is not first": {with(encode(key, expired, certificate), password), ""},
		"wrong password":                   {with(good, "wrong"), "wrong password in key password for the PKCS12 file in key certificate"},
		"no password":                      {map[string][]byte{"certificate": good}, "the PKCS12 file in key certificate has a password; want it in key password"},
		"no such key":                      {map[string][]byte{"cert": good, "password": nil}, "has keys cert, password; want certificate"},
		"no keys":                          {nil, "has no keys; want certificate"},
		"empty":                            {with(nil, password), "key certificate is empty"},
		"no private key":                   {with(trust, password), "private key missing"},
		"not PKCS12":                       {with([]byte(password), password), "key certificate is not a PKCS12 file with one certificate and its private key"},
		"cut off":                          {with(good[:len(good)-1], password), "key certificate is not a PKCS12 file"},
		"PEM":                              {with(plain, ""), "key certificate is PEM; want a PKCS12 file"},
		"expired":                          {with(encode(expiredKey, expired), password), "the certificate in certificate expired at " + expired.NotAfter.UTC().Format(time.RFC3339)},
		"not valid yet":                    {with(encode(earlyKey, early), password), "is not valid before"},
		"another's key":                    {with(encode(earlyKey, certificate), password), "no certificate in certificate belongs to the private key in it"},
		"not RSA":                          {with(encode(curve, onCurve), password), "is not an RSA key"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := certificateIn(tc.data)
			if err == nil {
				err = got.validAt(now)
			}
			if tc.err == "" {
				require.NoError(t, err)
				assert.True(t, key.Equal(got.key))
				assert.Equal(t, certificate.Raw, got.chain[0].Raw)
				return
			}
			require.ErrorContains(t, err, tc.err)
			assert.NotContains(t, err.Error(), password)
		})
	}
}

func TestCredentialErrorClass(t *testing.T) {
	p := newPrincipals(t, nil)
	err := p.fails(t, p.key(func(k *tokencache.Principal) { k.SecretName = "gone" }))
	assert.EqualError(t, err, "secret shop/gone: it cannot be read: there is no such secret")
	assert.Equal(t, tokencache.Refused, classOf(err))

	p.err = errors.New("dial tcp: connection refused")
	err = p.fails(t, p.key(nil))
	assert.EqualError(t, err, "secret shop/sp: dial tcp: connection refused")
	assert.Equal(t, tokencache.Unavailable, classOf(err))

	p.err = nil
	p.secrets["sp"] = map[string][]byte{"a": []byte(clientSecret), "b": nil}
	assert.Equal(t, tokencache.Refused, classOf(p.fails(t, p.key(nil))))
	assert.Equal(t, tokencache.Refused, classOf(p.fails(t, p.key(byCertificate))))
	assert.Equal(t, tokencache.Refused, classOf(p.fails(t, p.key(func(k *tokencache.Principal) { k.TenantID = "a/b" }))))
	assert.Empty(t, p.entra.Calls())

	p = newPrincipals(t, func(c *Config) { c.Secret = nil })
	err = p.fails(t, p.key(nil))
	assert.ErrorContains(t, err, "this agent reads no secrets")
	assert.Equal(t, tokencache.Refused, classOf(err))
}
