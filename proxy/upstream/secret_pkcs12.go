package upstream

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"

	"software.sslmate.com/src/go-pkcs12"
)

const (
	// maxIterations bounds the iterations of each key derivation that a PKCS12 file asks
	// for. OpenSSL uses 2,048, Windows 2,000, Java 10,000; a million take about a second,
	// and cannot be interrupted.
	maxIterations = 1_000_000
	// maxPKCS12 bounds the size of a file, in bytes. A long chain takes 20 KB.
	maxPKCS12 = 64 << 10
)

// The parts of a PKCS12 file (RFC 7292, section 4) that say how its keys are derived, parsed
// as go-pkcs12 parses them.
type (
	pfx struct {
		Version  int
		AuthSafe contentInfo
		MacData  macData `asn1:"optional"`
	}
	contentInfo struct {
		Raw         asn1.RawContent
		ContentType asn1.ObjectIdentifier
		Content     asn1.RawValue `asn1:"tag:0,explicit,optional"`
	}
	macData struct {
		Mac        digestInfo
		Salt       []byte
		Iterations int `asn1:"optional,default:1"`
	}
	digestInfo struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
	encryptedData struct {
		Version int
		Content struct {
			ContentType asn1.ObjectIdentifier
			Algorithm   pkix.AlgorithmIdentifier
			Encrypted   asn1.RawValue `asn1:"tag:0,optional"`
		}
	}
	safeBag struct {
		ID         asn1.ObjectIdentifier
		Value      asn1.RawValue `asn1:"tag:0,explicit"`
		Attributes asn1.RawValue `asn1:"set,optional"`
	}
	encryptedKey struct {
		Algorithm pkix.AlgorithmIdentifier
		Encrypted []byte
	}
	pbeParams struct {
		Salt       []byte
		Iterations int
	}
	kdfParams struct { // of PBES2 and PBMAC1 (RFC 8018)
		KDF    pkix.AlgorithmIdentifier
		Scheme pkix.AlgorithmIdentifier
	}
	pbkdf2Params struct {
		Salt       asn1.RawValue
		Iterations int
		KeyLength  int                      `asn1:"optional"`
		PRF        pkix.AlgorithmIdentifier `asn1:"optional"`
	}
)

var (
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidEncryptedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 6}
	oidKeyBag        = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 1}
	oidShroudedKey   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 2}
	oidPBES2         = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBMAC1        = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 14}
	oidSHA256        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
)

// decodePKCS12 decodes an untrusted file: anyone who may write a Secret could otherwise keep
// the agent busy for hours.
//
//  1. All iteration counts that can be read without the password are checked.
//  2. The password is checked, as it is, and without a trailing newline from a text file.
//  3. The file is decoded with its unencrypted contents first. The iteration count of a key
//     in the encrypted contents is unknown until they are decrypted. But the decoder refuses
//     a second private key before it decrypts it, and the first is one whose count has been
//     checked.
func decodePKCS12(file []byte, password string) (key any, chain []*x509.Certificate, err error) {
	contents, err := checkPKCS12(file)
	if err != nil {
		return nil, nil, err
	}
	for _, word := range []string{password, strings.TrimRight(password, "\r\n")} {
		// For the MAC alone: this decrypts no private key.
		if _, err = pkcs12.DecodeTrustStore(file, word); errors.Is(err, pkcs12.ErrIncorrectPassword) {
			continue
		}
		encodings := [][]byte{bmpString(word)}
		if word == "" { // some programs encode it as zero bytes
			encodings = append(encodings, nil)
		}
		for _, encoded := range encodings {
			var leaf *x509.Certificate
			var others []*x509.Certificate
			if key, leaf, others, err = pkcs12.DecodeChain(encodePFX(contents, encoded), word); err == nil {
				return key, append([]*x509.Certificate{leaf}, others...), nil
			}
		}
		break
	}
	return nil, nil, err
}

// checkPKCS12 checks the iteration counts that can be read without the password, and returns
// the file's contents, unencrypted ones first.
func checkPKCS12(file []byte) ([]contentInfo, error) {
	if len(file) > maxPKCS12 {
		return nil, fmt.Errorf("it has %d bytes; the limit is %d", len(file), maxPKCS12)
	}
	var outer pfx
	var inner []byte
	var contents []contentInfo
	if err := errors.Join(unmarshal(file, &outer), unmarshal(outer.AuthSafe.Content.Bytes, &inner), unmarshal(inner, &contents)); err != nil {
		return nil, err
	}
	if mac := outer.MacData; mac.Mac.Algorithm.Algorithm.Equal(oidPBMAC1) {
		if err := checkKDF(mac.Mac.Algorithm); err != nil {
			return nil, err
		}
	} else if err := checkIterations(mac.Iterations); err != nil {
		return nil, err
	}
	var plain, encrypted []contentInfo
	keys := 0
	for _, content := range contents {
		switch {
		case content.ContentType.Equal(oidEncryptedData):
			var data encryptedData
			if err := unmarshal(content.Content.Bytes, &data); err != nil {
				return nil, err
			}
			if err := checkKDF(data.Content.Algorithm); err != nil {
				return nil, err
			}
			encrypted = append(encrypted, content)
		case content.ContentType.Equal(oidData):
			n, err := checkBags(content)
			if err != nil {
				return nil, err
			}
			keys += n
			plain = append(plain, content)
		default:
			return nil, fmt.Errorf("contents of type %s are not supported", content.ContentType)
		}
	}
	switch {
	case keys == 0:
		return nil, errors.New("private key missing, or inside of the encrypted contents; openssl pkcs12 -export puts it beside them")
	case keys > 1:
		return nil, fmt.Errorf("it has %d private keys; want one", keys)
	}
	return append(plain, encrypted...), nil
}

// checkBags checks and counts the private keys in unencrypted contents.
func checkBags(content contentInfo) (keys int, err error) {
	var data []byte
	var bags []safeBag
	if err := errors.Join(unmarshal(content.Content.Bytes, &data), unmarshal(data, &bags)); err != nil {
		return 0, err
	}
	for _, bag := range bags {
		switch {
		case bag.ID.Equal(oidKeyBag):
			keys++
		case bag.ID.Equal(oidShroudedKey):
			keys++
			var key encryptedKey
			if err := unmarshal(bag.Value.Bytes, &key); err != nil {
				return 0, err
			}
			if err := checkKDF(key.Algorithm); err != nil {
				return 0, err
			}
		}
	}
	return keys, nil
}

// checkKDF checks the parameters of a password-based algorithm.
func checkKDF(algorithm pkix.AlgorithmIdentifier) error {
	if !algorithm.Algorithm.Equal(oidPBES2) && !algorithm.Algorithm.Equal(oidPBMAC1) {
		var params pbeParams // RFC 7292, appendix C; the decoder supports no others
		if err := unmarshal(algorithm.Parameters.FullBytes, &params); err != nil {
			return err
		}
		return checkIterations(params.Iterations)
	}
	var params kdfParams
	var pbkdf2 pbkdf2Params // the decoder supports no other
	if err := errors.Join(unmarshal(algorithm.Parameters.FullBytes, &params), unmarshal(params.KDF.Parameters.FullBytes, &pbkdf2)); err != nil {
		return err
	}
	return checkIterations(pbkdf2.Iterations)
}

func checkIterations(n int) error {
	if n > maxIterations {
		return fmt.Errorf("it asks for %d iterations to derive a key; the limit is %d: export it again with fewer", n, maxIterations)
	}
	return nil
}

// unmarshal is asn1.Unmarshal, and refuses trailing data.
func unmarshal(b []byte, into any) error {
	rest, err := asn1.Unmarshal(b, into)
	if err == nil && len(rest) > 0 {
		err = errors.New("trailing data")
	}
	return err
}

// encodePFX encodes contents as a PKCS12 file, with a MAC for the encoded password, without
// salt and with one iteration.
func encodePFX(contents []contentInfo, password []byte) []byte {
	inner := marshal(contents)
	// RFC 7292, appendix B.2: the diversifier for MACs, no salt, and the password repeated to
	// fill blocks. The key is as long as the output of SHA-256.
	const block = sha256.BlockSize
	input := bytes.Repeat([]byte{3}, block)
	for blocks := (len(password) + block - 1) / block; len(input) < (1+blocks)*block; {
		input = append(input, password[:min(len(password), (1+blocks)*block-len(input))]...)
	}
	derived := sha256.Sum256(input)
	mac := hmac.New(sha256.New, derived[:])
	mac.Write(inner)
	return marshal(pfx{
		Version:  3,
		AuthSafe: contentInfo{ContentType: oidData, Content: asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: marshal(inner)}},
		MacData:  macData{Mac: digestInfo{Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidSHA256}, Digest: mac.Sum(nil)}, Salt: []byte{}, Iterations: 1},
	})
}

func marshal(v any) []byte {
	b, err := asn1.Marshal(v)
	if err != nil {
		panic(err) // its values were unmarshalled, or made above
	}
	return b
}

// bmpString encodes a password by RFC 7292, appendix B.1: UTF-16, big-endian, with a zero at
// the end.
func bmpString(password string) []byte {
	var b []byte
	for _, unit := range append(utf16.Encode([]rune(password)), 0) {
		b = append(b, byte(unit>>8), byte(unit))
	}
	return b
}
