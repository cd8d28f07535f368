package metadata

import (
	"regexp"
	"strings"
	"testing"
)

func TestShortID(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "c0ffee": "c0ffee", "0123456789abcdef0123": "0123456789ab",
		"my-long-container-name":               "my-long-container-name",
		strings.Repeat("0a", 32):               "0a0a0a0a0a0a",
		"153ff1d7-8e2a-4b6f-9c11-2f6e0c7d9a10": "153ff1d7",
		"153ff1d7-8e2a-4b6f-9c11-2f6e0c7d9a1g": "153ff1d7-8e2a-4b6f-9c11-2f6e0c7d9a1g",
	} {
		if got := ShortID(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestHostName: whatever a container is called, its host name is a label of RFC 1123.
func TestHostName(t *testing.T) {
	label := regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	long, alloc := strings.Repeat("a-", 40), "153ff1d7-8e2a-4b6f-9c11-2f6e0c7d9a10"
	pod := func(name string) map[string]string { return map[string]string{LabelPodName: name} }
	for _, tc := range []struct {
		c    Container
		want string
	}{
		{Container{ID: "c", Name: "five/grp/153ff1d7"}, "five-grp-153ff1d7"},
		{Container{ID: "c", Name: "App-Web_1"}, "app-web-1"},
		{Container{ID: "c", Name: "default/web-0", Labels: pod("web-0")}, "web-0"},
		{Container{ID: "c", Labels: pod(long + "end")}, long[:61] + "-a"},
		{Container{ID: "c", Labels: pod(strings.Repeat("b", 62) + ".c")}, strings.Repeat("b", 62)},
		{Container{ID: "c", Name: long + "/153ff1d7"}, long[:54] + "-153ff1d7"},
		{Container{ID: alloc}, "153ff1d7"},
		{Container{ID: strings.Repeat("0a", 32), Name: "/"}, "0a0a0a0a0a0a"},
		{Container{ID: "Ünîcode", Name: "日本"}, "n-code"},
		{Container{ID: "_", Name: "-"}, "container"},
	} {
		if got := tc.c.HostName(); got != tc.want || !label.MatchString(got) {
			t.Errorf("%+v: %q (%d), want %q", tc.c, got, len(got), tc.want)
		}
	}
}
