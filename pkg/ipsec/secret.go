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

// DefaultSecretFile is the file with the secret that all hosts share.
const DefaultSecretFile = "/etc/lariat/ipsec.secret" //nolint:gosec // the name of a file, not a secret

// MinSecret is the minimal length of a secret in characters.
// 32 random bytes are 44 characters of base64.
const MinSecret = 32

// The salt and the labels of HKDF (RFC 5869) separate these keys from other keys of one secret.
const (
	salt     = "lariat ipsec v1"
	labelPSK = "pair "
	labelID  = "id"
)

// Secrets keeps the content of a file of secrets. The first secret is in use.
// The other secrets are still accepted. Secrets prints as its ids.
type Secrets struct{ list []secret }

type secret struct {
	id    string
	value []byte
}

// ReadSecrets reads a file of secrets. Each line holds one secret. The preferred one comes first.
// ReadSecrets skips empty lines and lines that begin with #. The file must be a regular file.
// Root or the caller must own the file, and no other user may read it.
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

// ParseSecrets parses the text of a file of secrets.
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
		panic(err) // only lengths beyond 255 hashes fail
	}
	return key
}

// IDs returns the ids of the secrets, in their order. An id is four bytes of HKDF output.
// An id reveals nothing about its secret.
func (s Secrets) IDs() []string {
	ids := make([]string, len(s.list))
	for i, x := range s.list {
		ids[i] = x.id
	}
	return ids
}

// String returns the ids.
func (s Secrets) String() string { return strings.Join(s.IDs(), ",") }

// GoString returns the ids, too: %#v must not print the secrets.
func (s Secrets) GoString() string { return s.String() }

// Pair returns the key of two IKE identities under one secret: 32 bytes.
// The order of the identities does not matter. Pair returns nil when there is no secret of that id.
func (s Secrets) Pair(id, a, b string) []byte {
	if b < a {
		a, b = b, a
	}
	for _, x := range s.list {
		if x.id == id {
			// The length distinguishes ("ab", "c") from ("a", "bc").
			return derive(x.value, fmt.Sprintf("%s%d %s %s", labelPSK, len(a), a, b), 32)
		}
	}
	return nil
}
