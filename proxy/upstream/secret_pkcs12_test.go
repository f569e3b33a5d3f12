package upstream

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"software.sslmate.com/src/go-pkcs12"
)

// endless takes hours.
const endless = 1 << 31

// oid3DES is pbeWithSHAAnd3-KeyTripleDES-CBC.
var oid3DES = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 1, 3}

func context0(der []byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: der}
}

// pbes2 is an algorithm that derives its key in n iterations.
func pbes2(n int, salt, iv []byte) pkix.AlgorithmIdentifier {
	algorithm := func(oid asn1.ObjectIdentifier, params any) pkix.AlgorithmIdentifier {
		return pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.RawValue{FullBytes: marshal(params)}}
	}
	prf := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}} // HMAC with SHA-256
	return algorithm(oidPBES2, kdfParams{
		KDF: algorithm(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}, pbkdf2Params{
			Salt: asn1.RawValue{Tag: asn1.TagOctetString, Bytes: salt}, Iterations: n, PRF: prf,
		}),
		Scheme: algorithm(asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}, iv), // AES-256 in CBC mode
	})
}

// sealed encrypts by PBES2 with one iteration, and claims n.
func sealed(t *testing.T, plain []byte, n int) (pkix.AlgorithmIdentifier, []byte) {
	t.Helper()
	salt, iv := make([]byte, 16), make([]byte, aes.BlockSize)
	_, _ = rand.Read(salt)
	key, err := pbkdf2.Key(sha256.New, password, salt, 1, 32)
	require.NoError(t, err)
	block, err := aes.NewCipher(key)
	require.NoError(t, err)
	pad := aes.BlockSize - len(plain)%aes.BlockSize
	b := append(bytes.Clone(plain), bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(b, b)
	return pbes2(n, salt, iv), b
}

func certificateBag(c *x509.Certificate) safeBag {
	type bag struct {
		ID   asn1.ObjectIdentifier
		Data []byte `asn1:"tag:0,explicit"`
	}
	return safeBag{
		ID:    asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 3},
		Value: context0(marshal(bag{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 22, 1}, c.Raw})),
	}
}

// keyBag returns a private key whose decryption claims to take n iterations; unencrypted
// for 0.
func keyBag(t *testing.T, key any, n int) safeBag {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	if n == 0 {
		return safeBag{ID: oidKeyBag, Value: context0(der)}
	}
	algorithm, encrypted := sealed(t, der, n)
	return safeBag{ID: oidShroudedKey, Value: context0(marshal(encryptedKey{algorithm, encrypted}))}
}

func plainContents(bags ...safeBag) contentInfo {
	return contentInfo{ContentType: oidData, Content: context0(marshal(marshal(bags)))}
}

func sealedContents(t *testing.T, n int, bags ...safeBag) contentInfo {
	t.Helper()
	var data encryptedData
	data.Content.ContentType = oidData
	var encrypted []byte
	data.Content.Algorithm, encrypted = sealed(t, marshal(bags), n)
	data.Content.Encrypted = asn1.RawValue{Class: asn1.ClassContextSpecific, Bytes: encrypted}
	return contentInfo{ContentType: oidEncryptedData, Content: context0(marshal(data))}
}

// withMAC sets the number of iterations for the key of a file's MAC.
func withMAC(t *testing.T, file []byte, n int) []byte {
	t.Helper()
	var outer pfx
	require.NoError(t, unmarshal(file, &outer))
	outer.MacData.Iterations = n
	if mac := &outer.MacData.Mac.Algorithm; mac.Algorithm.Equal(oidPBMAC1) {
		mac.Parameters = pbes2(n, []byte("salt"), nil).Parameters
	}
	return marshal(outer)
}

// Anyone who may write a Secret must not keep the agent busy for long, neither by an
// iteration count in the clear, nor by one in encrypted contents.
func TestEndlessPKCS12FilesAreRefused(t *testing.T) {
	certificate, key := pair()
	encode := func(encoder *pkcs12.Encoder) []byte {
		file, err := encoder.Encode(key, certificate, nil, password)
		require.NoError(t, err)
		return file
	}
	made := func(contents ...contentInfo) []byte { return encodePFX(contents, bmpString(password)) }
	cert, open, slow := certificateBag(certificate), keyBag(t, key, 1), keyBag(t, key, endless)
	beyond := marshal(pbeParams{Salt: []byte("salt"), Iterations: endless})
	const iterations = "asks for 2147483648 iterations to derive a key; the limit is 1000000"
	for name, tc := range map[string]struct {
		file []byte
		err  string
	}{
		"valid":                                 {made(sealedContents(t, 1, cert), plainContents(open)), ""},
		"nothing encrypted":                     {made(plainContents(keyBag(t, key, 0), cert)), ""},
		"the MAC":                               {withMAC(t, encode(pkcs12.Modern), endless), iterations},
		"the MAC, one above the limit":          {withMAC(t, encode(pkcs12.Modern), maxIterations+1), "asks for 1000001"},
		"the MAC, of RFC 9579":                  {withMAC(t, encode(pkcs12.Modern2026), endless), iterations},
		"the MAC, the largest number":           {withMAC(t, encode(pkcs12.Modern), math.MaxInt64), "asks for 9223372036854775807"},
		"the encrypted certificates":            {made(sealedContents(t, endless, cert), plainContents(open)), iterations},
		"the key":                               {made(sealedContents(t, 1, cert), plainContents(slow)), iterations},
		"the key, by an older algorithm":        {made(sealedContents(t, 1, cert), plainContents(safeBag{ID: oidShroudedKey, Value: context0(marshal(encryptedKey{pkix.AlgorithmIdentifier{Algorithm: oid3DES, Parameters: asn1.RawValue{FullBytes: beyond}}, []byte("x")}))})), iterations},
		"a key inside":                          {made(sealedContents(t, 1, cert, slow)), "private key missing"},
		"a key inside, and none outside":        {made(sealedContents(t, 1, cert, slow), plainContents()), "private key missing"},
		"a key inside, after a good one":        {made(plainContents(open), sealedContents(t, 1, cert, slow)), "exactly one key bag"},
		"a key inside, before a good one":       {made(sealedContents(t, 1, slow, cert), plainContents(open)), "exactly one key bag"},
		"a key inside, before one in the clear": {made(sealedContents(t, 1, slow, cert), plainContents(keyBag(t, key, 0))), "exactly one key bag"},
		"two keys":                              {made(sealedContents(t, 1, cert), plainContents(open, open)), "it has 2 private keys; want one"},
		"two keys, one of them endless":         {made(sealedContents(t, 1, cert), plainContents(open, slow)), iterations},
		"contents of another type":              {made(contentInfo{ContentType: oidSHA256, Content: context0(marshal([]byte{1}))}), "are not supported"},
		"a large file":                          {append(encode(pkcs12.Modern), make([]byte, maxPKCS12)...), "the limit is 65536"},
	} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			got, err := certificateIn(map[string][]byte{"certificate": tc.file, "password": []byte(password)})
			assert.Less(t, time.Since(begin), 30*time.Second)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			assert.True(t, key.Equal(got.key))
			assert.Equal(t, certificate.Raw, got.chain[0].Raw)
		})
	}
}

func TestPasswordEncoding(t *testing.T) {
	certificate, key := pair()
	for _, word := range []string{"", "a", "pässwörd €", strings.Repeat("x", 31), strings.Repeat("x", 32), strings.Repeat("long", 1000)} {
		file, err := pkcs12.LegacyDES.Encode(key, certificate, nil, word)
		require.NoError(t, err)
		_, err = certificateIn(map[string][]byte{"certificate": file, "password": []byte(word)})
		assert.NoError(t, err, "%.10q", word)
	}
	// With a password of zero bytes and no salt only the diversifier is hashed.
	derived := func(id byte) []byte {
		sum := sha1.Sum(bytes.Repeat([]byte{id}, sha1.BlockSize))
		return append(sum[:], sum[:]...)
	}
	block, err := des.NewTripleDESCipher(derived(1)[:24])
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	pad := des.BlockSize - len(der)%des.BlockSize
	der = append(der, bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(block, derived(2)[:des.BlockSize]).CryptBlocks(der, der)
	algorithm := pkix.AlgorithmIdentifier{Algorithm: oid3DES, Parameters: asn1.RawValue{FullBytes: marshal(pbeParams{Salt: []byte{}, Iterations: 1})}}
	bag := safeBag{ID: oidShroudedKey, Value: context0(marshal(encryptedKey{algorithm, der}))}
	file := encodePFX([]contentInfo{plainContents(bag, certificateBag(certificate))}, nil)
	_, err = certificateIn(map[string][]byte{"certificate": file})
	assert.NoError(t, err, "no password, encoded as zero bytes")
}

func FuzzCheckPKCS12(f *testing.F) {
	certificate, key := pair()
	for _, encoder := range []*pkcs12.Encoder{pkcs12.Modern, pkcs12.Modern2026, pkcs12.LegacyRC2} {
		file, err := encoder.WithIterations(1).Encode(key, certificate, nil, password)
		require.NoError(f, err)
		f.Add(file)
	}
	f.Fuzz(func(_ *testing.T, file []byte) {
		if contents, err := checkPKCS12(file); err == nil {
			encodePFX(contents, bmpString(password)) // does not panic
		}
	})
}
