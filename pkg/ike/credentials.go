package ike

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/private"
)

// Credentials keeps the proof of a host's identity: secrets or a certificate.
// Credentials prints without secret content.
type Credentials struct {
	Secrets ipsec.Secrets

	Certificate [][]byte   // DER: the host's own certificate, then the chain up to the authority's
	Key         PrivateKey // of the certificate
	CAs         [][]byte   // DER: authorities of other hosts' certificates
}

// A PrivateKey is a key in PKCS #8 that does not print.
type PrivateKey []byte

func (PrivateKey) String() string { return "(private key)" }

// GoString keeps %#v from printing the key.
func (PrivateKey) GoString() string { return "(private key)" }

// Format keeps every other verb from printing the key.
func (k PrivateKey) Format(f fmt.State, _ rune) { fmt.Fprint(f, k.String()) }

// LoadCertificates reads a host's directory from "lariat certs".
// It holds ca.crt, and one certificate with its key, NAME.crt and NAME.key.
// LoadCertificates trusts all certificates in ca.crt. Errors never hold the content of a key.
func LoadCertificates(dir string) (Credentials, error) {
	var c Credentials
	var err error
	if c.CAs, err = readCerts(filepath.Join(dir, certs.CACert)); err != nil {
		return Credentials{}, fmt.Errorf("authority of the encrypted networks: %w; copy ca.crt there from where "+
			"\"lariat certs\" made it", err)
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.key"))
	if err != nil {
		return Credentials{}, err
	}
	found = slices.DeleteFunc(found, func(f string) bool { return filepath.Base(f) == certs.CAKey })
	if len(found) != 1 {
		return Credentials{}, fmt.Errorf("certificate of this host: %s holds %d keys; there must be one, NAME.key, "+
			"beside NAME.crt", dir, len(found))
	}
	file := found[0]
	if c.Certificate, err = readCerts(file[:len(file)-len(".key")] + ".crt"); err != nil {
		return Credentials{}, fmt.Errorf("certificate of this host: %w", err)
	}
	key, err := private.Read(file)
	if err != nil {
		return Credentials{}, fmt.Errorf("key of this host: %w", err)
	}
	if c.Key, err = parseKey(key, c.Certificate[0]); err != nil {
		return Credentials{}, fmt.Errorf("key of this host: %s: %w", file, err)
	}
	return c, nil
}

func readCerts(file string) (out [][]byte, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(b.Bytes); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		out = append(out, b.Bytes)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no certificate in PEM", file)
	}
	return out, nil
}

// parseKey returns the key of a certificate. Errors never hold the content of the key.
func parseKey(text, cert []byte) (PrivateKey, error) {
	b, _ := pem.Decode(text)
	if b == nil {
		return nil, errors.New("no key in PEM")
	}
	var k any
	var err error
	switch b.Type {
	case "PRIVATE KEY":
		k, err = x509.ParsePKCS8PrivateKey(b.Bytes)
	case "EC PRIVATE KEY":
		k, err = x509.ParseECPrivateKey(b.Bytes)
	case "RSA PRIVATE KEY":
		k, err = x509.ParsePKCS1PrivateKey(b.Bytes)
	default:
		return nil, fmt.Errorf("a %s is no key that can be used", b.Type)
	}
	if err != nil {
		return nil, errors.New("the key cannot be read")
	}
	signer, ok := k.(crypto.Signer)
	if !ok {
		return nil, errors.New("the key cannot sign")
	}
	c, err := x509.ParseCertificate(cert)
	if err != nil {
		return nil, err
	}
	if pub, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(signer.Public()) {
		return nil, errors.New("it is not the key of the certificate beside it")
	}
	return x509.MarshalPKCS8PrivateKey(k)
}
