package server

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// F103: two hosts have a volume of one name, and each tells of its own.
func TestF103VolumesOfHosts(t *testing.T) {
	ctx := t.Context()
	a, st := one(t, overlay("10.42.0.0/24"))
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	data := metadata.Volume{Driver: "lariat-nfs", Name: "data", Scope: "global", State: "ready",
		Created: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)}
	put := func(n *node, v metadata.Volume) {
		t.Helper()
		if err := n.Client.PutVolume(ctx, v); err != nil {
			t.Fatal(err)
		}
	}
	want := func(self bool, volumes ...metadata.Volume) {
		t.Helper()
		if got, err := a.Client.Volumes(ctx, self); err != nil || !slices.Equal(got, volumes) {
			t.Errorf("self %t: %v\n%+v, want\n%+v", self, err, got, volumes)
		}
	}
	want(false)
	put(a, data)
	put(a, data)
	put(b, data)
	onA, onB := data, data
	onA.Host, onB.Host = "a", "b"
	want(false, onA, onB)

	onA.Users = 2
	put(a, onA)
	long := metadata.Volume{Driver: "x", Name: strings.Repeat("n", metadata.MaxVolumeNameLength), Scope: "local",
		Host: "a", State: "creating"}
	put(a, long)
	want(false, onA, long, onB)
	want(true, onA, long)

	for range 2 {
		if err := a.Client.RemoveVolume(ctx, "lariat-nfs", "data"); err != nil {
			t.Fatal(err)
		}
	}
	want(false, long, onB)
}

func TestVolumesAreChecked(t *testing.T) {
	ctx := t.Context()
	a, _ := one(t, overlay("10.42.0.0/24"))
	for _, c := range []struct{ path, body, want string }{
		{"d/.v", `{"scope":"local","state":"ready"}`, `".v"`},
		{"d/v%20w", `{"scope":"local","state":"ready"}`, `"v w"`},
		{"d%2Fe/v", `{"scope":"local","state":"ready"}`, `"d/e"`},
		{"d/" + strings.Repeat("n", 129), `{"scope":"local","state":"ready"}`, "1 to 128"},
		{"d/v", `{"scope":"zonal","state":"ready"}`, `"zonal" is neither`},
		{"d/v", `{"scope":"local"}`, `state ""`},
		{"d/v", `{"scope":"local","state":"ready","users":-1}`, "-1 users"},
		{"d/v", `{"scope":"local","state":"ready","host":"b"}`, "each host writes its own, and this is a"},
		{"d/v", `{"scope":"local","state":"ready","name":"w"}`, `the object says "w", the path "v"`},
		{"d/v", `{"scope":"local","state":"ready","options":{"password":"x"}}`, `unknown key "options"`},
	} {
		wantCode(t, a.Client.Do(ctx, "PUT", "/v1/volumes/"+c.path, json.RawMessage(c.body), nil), metadata.CodeInvalid,
			c.want)
	}
	wantCode(t, a.Client.Do(ctx, "DELETE", "/v1/volumes/d%2Fe/v", nil, nil), metadata.CodeInvalid, `"d/e"`)
	if left, err := a.Client.Volumes(ctx, false); err != nil || len(left) != 0 {
		t.Errorf("%v %+v", err, left)
	}
}
