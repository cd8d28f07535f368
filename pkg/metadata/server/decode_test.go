package server

import (
	"bytes"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func TestUnknownKeysNameTheNearest(t *testing.T) {
	for body, want := range map[string]string{
		`{"containerId2":"x"}`:          `did you mean "containerID"?`,
		`{"create":{"hostNatt":true}}`:  `did you mean "hostNAT"?`,
		`{"wait":1}`:                    `unknown key "wait"`,
		`{"containerID":7}`:             "containerID",
		`{"containerID":"x"} {}`:        "something follows",
		`{"requested":["10.42.0.300"]}`: "10.42.0.300",
		`{"mac":"zz"}`:                  "zz",
		``:                              "request body",
		`{"create":{"subnets":["10.42.0.0/33"]}}`:   "10.42.0.0/33",
		`{"create":{"gateways":["x"],"zzzzzzzz":1}`: "x",
	} {
		var r metadata.AttachRequest
		if err := decode(strings.NewReader(body), &r); !metadata.IsCode(err, metadata.CodeInvalid) ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", body, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"containerID":"c","ifname":"eth0","requested":["10.0.0.1"],"create":{"subnets":["10.0.0.0/8"]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r metadata.AttachRequest
		if err := decode(bytes.NewReader(data), &r); err != nil {
			if !metadata.IsCode(err, metadata.CodeInvalid) {
				t.Fatal(err)
			}
			return
		}
		validAttach(metadata.AttachmentID{ContainerID: r.ContainerID, IfName: r.IfName},
			&r) //nolint:errcheck // must not panic
		if r.Create != nil {
			r.Create.Validate() //nolint:errcheck // must not panic
		}
	})
}
