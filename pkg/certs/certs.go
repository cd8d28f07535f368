// Package certs makes the certificates with which hosts trust each other, for those who have no PKI: one
// authority, and for each host one certificate that serves as server and as client, between etcd's members as
// well as towards them.
//
// A folder holds it all: ca.crt, ca.key, and for each host NAME.crt and NAME.key. Files appear whole or not
// at all, with mode 0600 (certificates too: nobody but the service reads them), and nothing is overwritten
// that was not asked for. Keys are never printed, and never part of an error.
package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/private"
)

// How long certificates live, and how far they reach back so that a host whose clock is a little behind accepts them.
const (
	CALifetime   = 10 * 365 * 24 * time.Hour
	HostLifetime = 2 * 365 * 24 * time.Hour
	backdate     = time.Hour
)

// The authority's file names in its folder.
const (
	CACert = "ca.crt"
	CAKey  = "ca.key"
)

// Names of blocks in PEM files.
const (
	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY"
)

// Info describes a certificate.
type Info struct {
	File        string    `json:"file"`
	Name        string    `json:"name"`
	CA          bool      `json:"ca"`
	Issuer      string    `json:"issuer"`
	DNS         []string  `json:"dns,omitempty"`
	IPs         []string  `json:"ips,omitempty"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	Fingerprint string    `json:"fingerprint"` // SHA-256 of the certificate
	HasKey      bool      `json:"hasKey"`      // its key lies beside it
	Problem     string    `json:"problem,omitempty"`
}

// Request is what a host's certificate should say.
type Request struct {
	Name  string
	IPs   []netip.Addr
	DNS   []string
	Renew bool // replace the certificate and key that are there; without IPs and DNS it keeps the old ones
}

// Init makes a certificate authority in dir, which may exist. An authority that is there already is never
// replaced: every certificate in use would be worthless.
func Init(dir, name string, now time.Time) (*Info, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("certificate authority %s: %w", dir, err)
	}
	for _, f := range []string{CACert, CAKey} {
		if _, err := os.Lstat(filepath.Join(dir, f)); err == nil {
			return nil, fmt.Errorf("certificate authority %s: %s is there already; use it, or choose another folder", dir, f)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("certificate authority %s: %w", dir, err)
	}
	t, err := template(name, now, CALifetime)
	if err != nil {
		return nil, err
	}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("certificate authority %s: %w", dir, err)
	}
	if err := writePair(dir, CACert, CAKey, der, key, false); err != nil {
		return nil, fmt.Errorf("certificate authority %s: %w", dir, err)
	}
	return Read(filepath.Join(dir, CACert), now)
}

// Host makes a host's certificate and key in dir, signed by the authority there. The name, localhost and the loopback
// addresses are always in it, for the service speaks to its own store too.
func Host(dir string, req Request, now time.Time) (*Info, error) {
	fail := func(err error) (*Info, error) { return nil, fmt.Errorf("certificate of host %s: %w", req.Name, err) }
	if err := validHost(req.Name); err != nil {
		return fail(err)
	}
	ca, caKey, err := authority(dir, now)
	if err != nil {
		return fail(err)
	}
	certFile, keyFile := req.Name+".crt", req.Name+".key"
	old, err := readCert(filepath.Join(dir, certFile))
	switch {
	case err == nil && !req.Renew:
		return fail(fmt.Errorf("%s is there already; use --renew to replace it", filepath.Join(dir, certFile)))
	case err == nil && len(req.IPs) == 0 && len(req.DNS) == 0:
		for _, ip := range old.IPAddresses {
			if a, ok := netip.AddrFromSlice(ip); ok {
				req.IPs = append(req.IPs, a.Unmap())
			}
		}
		req.DNS = old.DNSNames
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fail(err)
	}
	t, err := template(req.Name, now, HostLifetime)
	if err != nil {
		return fail(err)
	}
	if t.NotAfter.After(ca.NotAfter) {
		t.NotAfter = ca.NotAfter
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, n := range append([]string{req.Name, "localhost"}, req.DNS...) {
		if err := validDNS(n); err != nil {
			return fail(err)
		}
		if !slices.Contains(t.DNSNames, n) {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	for _, a := range append([]netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, req.IPs...) {
		ip := net.IP(a.Unmap().AsSlice())
		if !slices.ContainsFunc(t.IPAddresses, ip.Equal) {
			t.IPAddresses = append(t.IPAddresses, ip)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fail(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca, key.Public(), caKey)
	if err != nil {
		return fail(err)
	}
	if err := writePair(dir, certFile, keyFile, der, key, req.Renew); err != nil {
		return fail(err)
	}
	return Read(filepath.Join(dir, certFile), now)
}

// Read describes a certificate file. What is wrong with the certificate stands in Problem.
func Read(file string, now time.Time) (*Info, error) {
	c, err := readCert(file)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(c.Raw)
	info := &Info{File: file, Name: c.Subject.CommonName, CA: c.IsCA, Issuer: c.Issuer.CommonName, DNS: c.DNSNames,
		NotBefore: c.NotBefore, NotAfter: c.NotAfter, Fingerprint: hex.EncodeToString(sum[:])}
	for _, ip := range c.IPAddresses {
		info.IPs = append(info.IPs, ip.String())
	}
	key, err := readKey(strings.TrimSuffix(file, ".crt") + ".key")
	switch {
	case err == nil && key.PublicKey.Equal(c.PublicKey):
		info.HasKey = true
	case err == nil:
		info.Problem = "the key beside it belongs to another certificate; make both anew with --renew"
	case !errors.Is(err, fs.ErrNotExist):
		info.Problem = err.Error()
	}
	if ca, err := readCert(filepath.Join(filepath.Dir(file), CACert)); info.Problem == "" && err == nil {
		if err := c.CheckSignatureFrom(ca); err != nil {
			info.Problem = "not signed by the authority beside it"
		}
	}
	switch {
	case now.After(c.NotAfter):
		info.Problem = fmt.Sprintf("expired on %s; make a new one: lariat certs host --renew",
			c.NotAfter.Format(time.DateOnly))
	case now.Before(c.NotBefore):
		info.Problem = fmt.Sprintf("not valid before %s; is this host's clock right?", c.NotBefore.Format(time.DateTime))
	case info.Problem == "" && c.NotAfter.Sub(now) < 30*24*time.Hour:
		info.Problem = fmt.Sprintf("expires on %s; make a new one: lariat certs host --renew",
			c.NotAfter.Format(time.DateOnly))
	}
	return info, nil
}

// ReadDir describes every certificate of a folder, the authority first.
func ReadDir(dir string, now time.Time) ([]Info, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.crt"))
	if err != nil {
		return nil, fmt.Errorf("certificates in %s: %w", dir, err)
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	var out []Info
	for _, f := range files {
		i, err := Read(f, now)
		if err != nil {
			i = &Info{File: f, Problem: err.Error()}
		}
		out = append(out, *i)
	}
	slices.SortStableFunc(out, func(a, b Info) int {
		switch {
		case a.CA && !b.CA:
			return -1
		case b.CA && !a.CA:
			return 1
		}
		return 0
	})
	return out, nil
}

func template(name string, now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, fmt.Errorf("serial number: %w", err)
	}
	return &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)),
		Subject:      pkix.Name{CommonName: name, Organization: []string{"lariat"}},
		NotBefore:    now.Add(-backdate).UTC().Truncate(time.Second),
		NotAfter:     now.Add(life).UTC().Truncate(time.Second),
	}, nil
}

// authority reads the CA of a folder and refuses one that cannot sign.
func authority(dir string, now time.Time) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	ca, err := readCert(filepath.Join(dir, CACert))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("no certificate authority in %s; make one with: lariat certs init %s", dir, dir)
	} else if err != nil {
		return nil, nil, err
	}
	key, err := readKey(filepath.Join(dir, CAKey))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%s is not in %s; run this where the authority was made", CAKey, dir)
	} else if err != nil {
		return nil, nil, err
	}
	switch {
	case !ca.IsCA:
		return nil, nil, fmt.Errorf("%s in %s is not an authority's certificate", CACert, dir)
	case !key.PublicKey.Equal(ca.PublicKey):
		return nil, nil, fmt.Errorf("%s and %s in %s do not belong together", CACert, CAKey, dir)
	case now.After(ca.NotAfter):
		return nil, nil, fmt.Errorf("the authority in %s expired on %s; make a new one in another folder", dir,
			ca.NotAfter.Format(time.DateOnly))
	}
	return ca, key, nil
}

func readCert(file string) (*x509.Certificate, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	b, err := decodePEM(file, text, pemCert)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(b)
	if err != nil {
		return nil, fmt.Errorf("certificate %s: %w", file, err)
	}
	return c, nil
}

// readKey refuses a key that others can read. Its errors never hold the file's content.
func readKey(file string) (*ecdsa.PrivateKey, error) {
	text, err := private.Read(file)
	if err != nil {
		return nil, fmt.Errorf("key %w", err)
	}
	b, err := decodePEM(file, text, pemKey)
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("key %s is damaged or not PKCS#8", file)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key %s is not an ECDSA key", file)
	}
	return key, nil
}

func decodePEM(file string, text []byte, kind string) ([]byte, error) {
	p, _ := pem.Decode(text)
	if p == nil || p.Type != kind {
		return nil, fmt.Errorf("%s holds no PEM block %q", file, kind)
	}
	return p.Bytes, nil
}

// writePair writes the key before the certificate: a certificate without its key would look finished. When the second
// fails, a new key is taken away again.
func writePair(dir, certFile, keyFile string, der []byte, key *ecdsa.PrivateKey, replace bool) error {
	pk, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	write := private.Write
	if replace {
		write = private.Rewrite
	}
	if err := write(filepath.Join(dir, keyFile), pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: pk})); err != nil {
		return err
	}
	if err := write(filepath.Join(dir, certFile), pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: der})); err != nil {
		if !replace {
			err = errors.Join(err, os.Remove(filepath.Join(dir, keyFile)))
		}
		return err
	}
	return nil
}

// validHost keeps a host's name from leaving the folder and from taking the authority's place.
func validHost(name string) error {
	if err := validDNS(name); err != nil {
		return err
	}
	if strings.EqualFold(name+".crt", CACert) {
		return fmt.Errorf("name %q is the authority's own", name)
	}
	return nil
}

func validDNS(name string) error {
	if name == "" || len(name) > 253 {
		return fmt.Errorf("name %q: want 1 to 253 characters", name)
	}
	for label := range strings.SplitSeq(name, ".") {
		ok := label != "" && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-'
		for _, c := range label {
			ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '*')
		}
		if !ok {
			return fmt.Errorf("name %q is not a DNS name", name)
		}
	}
	return nil
}
