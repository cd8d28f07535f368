package ipsec

import (
	"bufio"
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/private"
)

// DefaultSecretFile is where a host keeps the secret that it shares with the others.
const DefaultSecretFile = "/etc/lariat/ipsec.secret" //nolint:gosec // the name of a file, not a secret

// MinSecret is the least length of a secret, in characters. 32 random octets are 44 characters of base64.
const MinSecret = 32

// The salt and the labels of HKDF (RFC 5869). They keep these keys apart from whatever else derives from the
// same secret.
const (
	salt     = "lariat ipsec v1"
	labelPSK = "pair "
	labelID  = "id"
)

// Secrets are what a file of secrets holds: the one in use first, and behind it those that are accepted
// still. They print as their ids.
type Secrets struct{ list []secret }

type secret struct {
	id    string
	value []byte
}

// ReadSecrets reads a file of secrets: one a line, the one to use first; empty lines and those that begin
// with # are skipped. The file must be a regular one that nobody but its owner, root or the caller, may read.
// Errors name the file and the line, never a secret.
func ReadSecrets(path string) (Secrets, error) {
	data, err := private.Read(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Secrets{}, fmt.Errorf("secret of the encrypted networks: %w; make one with: lariat ipsec secret --out "+
			"%s, and give the same to every host", err, path)
	case err != nil:
		return Secrets{}, fmt.Errorf("secret file %w", err)
	}
	s, err := ParseSecrets(data)
	if err != nil {
		return Secrets{}, fmt.Errorf("secret file %s: %w", path, err)
	}
	return s, nil
}

// ParseSecrets reads the text of a file of secrets.
func ParseSecrets(text []byte) (Secrets, error) {
	var s Secrets
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 64<<10)
	for n := 1; lines.Scan(); n++ {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if len(line) < MinSecret {
			return Secrets{}, fmt.Errorf("line %d: a secret of %d characters; want at least %d: lariat ipsec secret makes one",
				n, len(line), MinSecret)
		}
		value := bytes.Clone(line)
		id := derive(value, labelID, 4)
		if slices.ContainsFunc(s.list, func(have secret) bool { return have.id == hex.EncodeToString(id) }) {
			return Secrets{}, fmt.Errorf("line %d: the same secret again", n)
		}
		s.list = append(s.list, secret{hex.EncodeToString(id), value})
	}
	if err := lines.Err(); err != nil {
		return Secrets{}, err
	}
	if len(s.list) == 0 {
		return Secrets{}, errors.New("no secret in it")
	}
	return s, nil
}

func derive(value []byte, label string, n int) []byte {
	key, err := hkdf.Key(sha256.New, value, []byte(salt), label, n)
	if err != nil {
		panic(err) // of lengths beyond 255 hashes alone
	}
	return key
}

// IDs name the secrets, in their order, without telling anything of them: four octets of HKDF output.
func (s Secrets) IDs() []string {
	ids := make([]string, len(s.list))
	for i, x := range s.list {
		ids[i] = x.id
	}
	return ids
}

// String is the ids.
func (s Secrets) String() string { return strings.Join(s.IDs(), ",") }

// GoString is the ids too: %#v must not print what %v does not.
func (s Secrets) GoString() string { return s.String() }

// Pair is the key of two IKE identities under one secret, the same whichever comes first: 32 octets. nil when
// there is no secret of that id.
func (s Secrets) Pair(id, a, b string) []byte {
	if b < a {
		a, b = b, a
	}
	for _, x := range s.list {
		if x.id == id {
			// The length keeps ("ab", "c") and ("a", "bc") apart.
			return derive(x.value, fmt.Sprintf("%s%d %s %s", labelPSK, len(a), a, b), 32)
		}
	}
	return nil
}
