package flex

import (
	"encoding/json"
	"errors"
	"strings"
	"unicode"

	"github.com/lariat-net/lariat/pkg/volume"
)

// The three words for how a call went.
const (
	Success      = "Success"
	Failure      = "Failure"
	NotSupported = "Not supported"
)

// Reply is the answer to a call. Of one for kubelet it ignores options, which are Rancher's.
type Reply struct {
	Status        string            `json:"status"`
	Message       string            `json:"message,omitempty"`
	Device        string            `json:"device,omitempty"`
	VolumeName    string            `json:"volumeName,omitempty"`
	Attached      *bool             `json:"attached,omitempty"`
	Capabilities  *Capabilities     `json:"capabilities,omitempty"` // never null: kubelet would follow the pointer
	VolumeNewSize int64             `json:"volumeNewSize,omitempty"`
	Options       map[string]string `json:"options,omitempty"`
}

// Capabilities are all written out, for kubelet's defaults are not ours.
type Capabilities struct {
	Attach           bool `json:"attach"`
	FSGroup          bool `json:"fsGroup"`
	SELinuxRelabel   bool `json:"selinuxRelabel"`
	SupportsMetrics  bool `json:"supportsMetrics"`
	RequiresFSResize bool `json:"requiresFSResize"`
}

// maxMessage is what fits in an event and in what a person reads.
const maxMessage = 4000

// encode is the one line that is printed.
func (r Reply) encode() []byte {
	r.Message = oneLine(r.Message)
	data, err := json.Marshal(r)
	if err != nil {
		data = []byte(`{"status":"Failure","message":"the answer could not be written as JSON"}`)
	}
	return append(data, '\n')
}

// oneLine has neither line breaks nor other control characters, and an end.
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

// failed is the reply to a call that ended in an error. Secrets do not get into it, whatever the error says.
func failed(err error, secrets map[string]string) Reply {
	r := Reply{Status: Failure, Message: redact(err.Error(), secrets)}
	if errors.Is(err, volume.ErrNotSupported) {
		r.Status = NotSupported
	}
	return r
}

// redact hides secrets by value. Very short ones would hide half of the text and can be guessed anyway.
func redact(text string, secrets map[string]string) string {
	for _, v := range secrets {
		if len(v) >= 4 {
			text = strings.ReplaceAll(text, v, "***")
		}
	}
	return text
}
