package flex

import (
	"encoding/json"
	"errors"
	"strings"
	"unicode"

	"github.com/lariat-net/lariat/pkg/volume"
)

// The three values of a reply's status.
const (
	Success      = "Success"
	Failure      = "Failure"
	NotSupported = "Not supported"
)

// Reply is the answer to a call. kubelet ignores Options, which only Rancher uses.
type Reply struct {
	Status        string            `json:"status"`
	Message       string            `json:"message,omitempty"`
	Device        string            `json:"device,omitempty"`
	VolumeName    string            `json:"volumeName,omitempty"`
	Attached      *bool             `json:"attached,omitempty"`
	Capabilities  *Capabilities     `json:"capabilities,omitempty"` // never null: kubelet would dereference it
	VolumeNewSize int64             `json:"volumeNewSize,omitempty"`
	Options       map[string]string `json:"options,omitempty"`
}

// Capabilities has all members in JSON, because kubelet's defaults differ from Lariat's.
type Capabilities struct {
	Attach           bool `json:"attach"`
	FSGroup          bool `json:"fsGroup"`
	SELinuxRelabel   bool `json:"selinuxRelabel"`
	SupportsMetrics  bool `json:"supportsMetrics"`
	RequiresFSResize bool `json:"requiresFSResize"`
}

// maxMessage is a length that fits in an event and that a person can read.
const maxMessage = 4000

// encode returns the reply as the one line of output.
func (r Reply) encode() []byte {
	r.Message = oneLine(r.Message)
	data, err := json.Marshal(r)
	if err != nil {
		data = []byte(`{"status":"Failure","message":"the answer could not be written as JSON"}`)
	}
	return append(data, '\n')
}

// oneLine returns a text without line breaks and control characters, at most maxMessage long.
func oneLine(s string) string {
	s = strings.Join(strings.FieldsFunc(strings.ToValidUTF8(s, "?"), func(r rune) bool { return r == '\n' || r == '\r' }),
		"; ")
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return s
}

// failed returns the reply to a call that ended in an error. Secrets are removed from the error's
// text.
func failed(err error, secrets map[string]string) Reply {
	r := Reply{Status: Failure, Message: redact(err.Error(), secrets)}
	if errors.Is(err, volume.ErrNotSupported) {
		r.Status = NotSupported
	}
	return r
}

// redact hides secrets by value. It ignores very short secrets, which would hide half of the text
// and can be guessed anyway.
func redact(text string, secrets map[string]string) string {
	for _, v := range secrets {
		if len(v) >= 4 {
			text = strings.ReplaceAll(text, v, "***")
		}
	}
	return text
}
