package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/metadata"
)

type conf struct {
	MTU  int `json:"mtu,omitempty"`
	IPAM struct {
		Type        string `json:"type"`
		WaitSeconds int    `json:"waitSeconds,omitempty"`
	} `json:"ipam"`
}

// plugin is a plugin whose verbs do what the test says.
type plugin struct {
	calls int
	do    func(*cni.Request) error
}

func (p *plugin) run(env map[string]string, stdin string) (doc map[string]any, documents, code int) {
	verb := func(_ context.Context, r *cni.Request) error {
		if _, err := cni.Decode[conf](r); err != nil {
			return err
		}
		p.calls++
		if p.do != nil {
			return p.do(r)
		}
		return nil
	}
	plug := cni.Plugin{Name: "test", Del: verb, Check: verb, Status: verb, GC: verb,
		Add: func(ctx context.Context, r *cni.Request) (*current.Result, error) {
			if err := verb(ctx, r); err != nil {
				return nil, err
			}
			return result(), nil
		}}
	var out bytes.Buffer
	code = plug.Run(func(k string) string { return env[k] }, strings.NewReader(stdin), &out, io.Discard)
	dec := json.NewDecoder(&out)
	for {
		var d map[string]any
		if dec.Decode(&d) != nil {
			return doc, documents, code
		}
		doc = d
		documents++
	}
}

func result() *current.Result {
	table, scope := 100, 0
	return &current.Result{CNIVersion: "1.1.0",
		Interfaces: []*current.Interface{{Name: "eth0", Mac: "0a:00:00:00:00:01", Mtu: 1450, Sandbox: "/x", SocketPath: "/s",
			PciID: "0000:00:1f.6"}},
		IPs: []*current.IPConfig{{Interface: current.Int(0), Address: net.IPNet{IP: net.IPv4(10, 42, 0, 5).To4(),
			Mask: net.CIDRMask(32, 32)}, Gateway: net.IPv4(10, 42, 0, 1).To4()}},
		Routes: []*types.Route{{Dst: net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
			GW: net.IPv4(10, 42, 0, 1).To4(), MTU: 1400, AdvMSS: 1360, Priority: 5, Table: &table, Scope: &scope}},
	}
}

func env(verb string, more ...string) map[string]string {
	e := map[string]string{"CNI_COMMAND": verb, "CNI_CONTAINERID": "c0ffee", "CNI_IFNAME": "eth0",
		"CNI_NETNS": "/proc/self/ns/net", "CNI_NETNS_OVERRIDE": "1", "CNI_PATH": "/opt/cni/bin"}
	for _, m := range more {
		k, v, _ := strings.Cut(m, "=")
		e[k] = v
	}
	return e
}

func config(version string, more string) string {
	prev := `"prevResult":{"cniVersion":"` + version + `","ips":[]},`
	return fmt.Sprintf(`{"cniVersion":%q,"name":"overlay","type":"test",%s%s"ipam":{"type":"x"}}`, version, prev, more)
}

// TestF2_Versions: VERSION lists them all, and each verb answers in the version that it was asked in.
func TestF2_Versions(t *testing.T) {
	var p plugin
	doc, n, code := p.run(env("VERSION"), `{"cniVersion":"1.0.0"}`)
	if code != 0 || n != 1 || fmt.Sprint(doc["supportedVersions"]) != fmt.Sprint(cni.Versions) ||
		doc["cniVersion"] != "1.0.0" {
		t.Fatalf("VERSION: code %d, %d documents, %v", code, n, doc)
	}
	if doc, _, code = p.run(env("VERSION"), ""); code != 0 || doc["cniVersion"] != "1.1.0" {
		t.Fatalf("VERSION without a configuration: code %d, %v", code, doc)
	}
	for _, v := range cni.Versions {
		for _, verb := range []string{"ADD", "DEL", "CHECK", "STATUS", "GC"} {
			t.Run(verb+" "+v, func(t *testing.T) {
				doc, n, code := p.run(env(verb), config(v, ""))
				since := map[string]string{"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}[verb]
				if v < since {
					if code != 1 || n != 1 || doc["code"] != 1.0 || doc["cniVersion"] != v {
						t.Fatalf("want error code 1 in version %s, got exit %d, %d documents, %v", v, code, n, doc)
					}
					return
				}
				want := 0
				if verb == "ADD" {
					want = 1
				}
				if code != 0 || n != want {
					t.Fatalf("exit %d, %d documents, %v", code, n, doc)
				}
				if verb == "ADD" && doc["cniVersion"] != v {
					t.Fatalf("result has the cniVersion %v", doc["cniVersion"])
				}
			})
		}
	}
}

// TestF2_OlderResultsHoldNothingNewer: fields of 1.1 never leak into older results.
func TestF2_OlderResultsHoldNothingNewer(t *testing.T) {
	newer := []string{"mtu", "socketPath", "pciID", "advmss", "priority", "table", "scope"}
	for _, v := range cni.Versions {
		var p plugin
		doc, _, _ := p.run(env("ADD"), config(v, ""))
		text, _ := json.Marshal(doc)
		for _, key := range newer {
			if has := strings.Contains(string(text), `"`+key+`"`); has != (v == "1.1.0") {
				t.Errorf("version %s: key %s: present is %t in %s", v, key, has, text)
			}
		}
		if has := strings.Contains(string(text), `"version":"4"`); has != (v < "1.0.0") {
			t.Errorf("version %s: the addresses' own version key: present is %t in %s", v, has, text)
		}
	}
}

// TestF10_F15_Refusals: what is wrong is refused before any verb runs, with the right code, in one document.
func TestF10_F15_Refusals(t *testing.T) {
	for _, tc := range []struct {
		name, stdin string
		env         map[string]string
		code        int
		want        string
	}{
		{"bad JSON", `{"cniVersion":"1.1.0",`, env("ADD"), cni.ErrDecode, "not JSON"},
		{"bad JSON at DEL", `nonsense`, env("DEL"), cni.ErrDecode, "line 1"},
		{"no configuration at all", ``, env("ADD"), cni.ErrDecode, "unexpected end of JSON input"},
		{"unknown version", config("2.0.0", ""), env("ADD"), cni.ErrIncompatibleVersion, "supported: 0.3.1"},
		{"no version", `{"name":"overlay","type":"test"}`, env("ADD"), cni.ErrIncompatibleVersion, "0.1.0"},
		{"unknown key, near one", config("1.1.0", `"mtuu":1400,`), env("ADD"), cni.ErrConfig,
			`unknown key "mtuu", did you mean "mtu"?`},
		{"unknown key, inside", `{"cniVersion":"1.1.0","name":"n","type":"t","ipam":{"type":"x","waitsecond":3}}`, env("ADD"),
			cni.ErrConfig, `did you mean "ipam.waitSeconds"?`},
		{"unknown key, far from all", config("1.1.0", `"zzzzzzzzzzz":1,`), env("ADD"), cni.ErrConfig,
			`unknown key "zzzzzzzzzzz"`},
		{"wrong type", config("1.1.0", `"mtu":"big",`), env("ADD"), cni.ErrConfig, `key "mtu": a string is not a int`},
		{"wrong type of a common key", `{"cniVersion":"1.1.0","name":7}`, env("ADD"), cni.ErrConfig, `key "name"`},
		{"bad network name", `{"cniVersion":"1.1.0","name":"a/b","type":"t"}`, env("ADD"), cni.ErrConfig, `"name"`},
		{"no verb", config("1.1.0", ""), env(""), cni.ErrEnvironment, "CNI_COMMAND is not set"},
		{"unknown verb", config("1.1.0", ""), env("INIT"), cni.ErrEnvironment, `"INIT" is unknown`},
		{"no container id", config("1.1.0", ""), env("ADD", "CNI_CONTAINERID="), cni.ErrEnvironment, "CNI_CONTAINERID"},
		{"hostile container id", config("1.1.0", ""), env("ADD", "CNI_CONTAINERID=../../etc"), cni.ErrEnvironment,
			"CNI_CONTAINERID"},
		{"no interface name and no netns", config("1.1.0", ""), env("ADD", "CNI_IFNAME=", "CNI_NETNS="), cni.ErrEnvironment,
			"CNI_IFNAME, CNI_NETNS"},
		{"hostile interface name", config("1.1.0", ""), env("DEL", "CNI_IFNAME=a/b"), cni.ErrEnvironment,
			"no interface name"},
		{"interface name too long", config("1.1.0", ""), env("DEL", "CNI_IFNAME=sixteencharacter"), cni.ErrEnvironment,
			"no interface name"},
		{"broken CNI_ARGS", config("1.1.0", ""), env("ADD", "CNI_ARGS=IgnoreUnknown=1;nonsense"), cni.ErrEnvironment,
			`"nonsense"`},
		{"own netns", config("1.1.0", ""), env("ADD", "CNI_NETNS_OVERRIDE="), cni.ErrNetns, "itself runs in"},
		{"vanished netns", config("1.1.0", ""), env("ADD", "CNI_NETNS_OVERRIDE=", "CNI_NETNS=/nonexistent/netns"),
			cni.ErrNetns, "/nonexistent/netns"},
		{"a file that is no netns", config("1.1.0", ""), env("ADD", "CNI_NETNS_OVERRIDE=", "CNI_NETNS=/dev/null"),
			cni.ErrNetns, "no network namespace"},
		{"CHECK without prevResult", `{"cniVersion":"1.1.0","name":"n","type":"t"}`, env("CHECK"), cni.ErrConfig,
			"prevResult"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var p plugin
			doc, n, code := p.run(tc.env, tc.stdin)
			if code != 1 || n != 1 || p.calls != 0 {
				t.Fatalf("exit %d, %d documents, verb ran %d times, %v", code, n, p.calls, doc)
			}
			text := fmt.Sprint(doc["msg"], doc["details"])
			if doc["code"] != float64(tc.code) || !strings.Contains(text, tc.want) || doc["cniVersion"] == nil ||
				doc["cniVersion"] == "" {
				t.Errorf("want code %d and %q, got %v", tc.code, tc.want, doc)
			}
		})
	}
}

// TestF6_DELForgives: a DEL does not fail for a word in the configuration, an unreadable prevResult, or a
// netns that is gone.
func TestF6_DELForgives(t *testing.T) {
	var p plugin
	for _, stdin := range []string{config("1.1.0", `"mtuu":1400,`),
		`{"cniVersion":"1.1.0","name":"n","type":"t","prevResult":{"ips":"nonsense"}}`} {
		for _, netns := range []string{"", "/nonexistent"} {
			if doc, n, code := p.run(env("DEL", "CNI_NETNS_OVERRIDE=", "CNI_NETNS="+netns), stdin); code != 0 || n != 0 {
				t.Errorf("exit %d, %v", code, doc)
			}
		}
	}
}

// TestArguments: keys of other plugins in the list are none of our business, with or without
// IgnoreUnknown. What is no pair keeps an ADD from asking for less than the caller meant, and no
// other verb from anything.
func TestArguments(t *testing.T) {
	for _, tc := range []struct {
		verb, args string
		code       int
		want       string
	}{
		{"ADD", "FOO=bar;IP=10.42.0.9", 0, "map[FOO:bar IP:10.42.0.9]"},
		{"ADD", "FOO=a=b;", 0, "map[FOO:a=b]"},
		{"ADD", "nonsense", 1, ""},
		{"CHECK", "nonsense", 1, ""},
		{"DEL", "nonsense;IP=10.42.0.9;=", 0, "map[:  IP:10.42.0.9]"},
		{"STATUS", "nonsense", 0, "map[]"},
		{"GC", "nonsense", 0, "map[]"},
	} {
		got := ""
		p := plugin{do: func(r *cni.Request) error {
			got = fmt.Sprint(r.Args)
			return nil
		}}
		doc, _, code := p.run(env(tc.verb, "CNI_ARGS="+tc.args), config("1.1.0", ""))
		if code != tc.code || strings.ReplaceAll(got, " ", "") != strings.ReplaceAll(tc.want, " ", "") {
			t.Errorf("%s %q: exit %d, %v, %s, want %s", tc.verb, tc.args, code, doc, got, tc.want)
		}
	}
}

// TestNothingSet: started with nothing, as by Nomad's client, a plugin says what it is. A runtime
// that forgot the verb gets an error.
func TestNothingSet(t *testing.T) {
	stdin := iotest.ErrReader(errors.New("a terminal without input"))
	semver := regexp.MustCompile(`^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)
	for version, want := range map[string]string{"v1.2.3": "v1.2.3", "1.2.3-4-gabc-dirty": "v1.2.3-4-gabc-dirty",
		"b918f6a-dirty": "v0.0.0+b918f6a-dirty", "1234567": "v0.0.0+1234567", "devel": "v0.0.0+devel",
		"01.2.3": "v0.0.0+01-2-3", "": "v0.0.0"} {
		var stdout, stderr bytes.Buffer
		p := cni.Plugin{Name: "lariat-test", Version: version}
		code := p.Run(func(string) string { return "" }, stdin, &stdout, &stderr)
		text := "CNI lariat-test plugin " + want + "\nCNI protocol versions supported: 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"
		if code != 0 || stdout.Len() > 0 || stderr.String() != text {
			t.Errorf("%q: exit %d, %q, %q", version, code, &stdout, &stderr)
		}
		if !semver.MatchString(want) {
			t.Errorf("%s is no semantic version", want)
		}
	}
	for _, name := range []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"} {
		var stdout, stderr bytes.Buffer
		getenv := func(n string) string { return map[string]string{name: "x"}[n] }
		code := cni.Plugin{Name: "lariat-test"}.Run(getenv, stdin, &stdout, &stderr)
		if out := stdout.String(); code != 1 || !strings.Contains(out, `"code":4`) || !strings.Contains(out, "CNI_COMMAND") {
			t.Errorf("%s: exit %d, %s", name, code, &stdout)
		}
	}
}

// TestF7_GCLists: an absent list is not an empty one.
func TestF7_GCLists(t *testing.T) {
	for _, tc := range []struct{ name, key, want string }{
		{"absent", ``, "nil"},
		{"empty", `"cni.dev/valid-attachments":[],`, "[]"},
		{"null, as CRI-O says it", `"cni.dev/valid-attachments":null,`, "[]"},
		{"one", `"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],`, "[a/eth0]"},
		{"older key", `"cni.dev/attachments":[{"containerID":"a","ifname":"eth0"}],`, "[a/eth0]"},
		{"both", `"cni.dev/attachments":[],"cni.dev/valid-attachments":[{"containerID":"b","ifname":"e"}],`, "[b/e]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := ""
			p := plugin{do: func(r *cni.Request) error {
				got = "nil"
				if r.Valid != nil {
					got = fmt.Sprint(*r.Valid)
				}
				return nil
			}}
			if doc, _, code := p.run(env("GC"), config("1.1.0", tc.key)); code != 0 || got != tc.want {
				t.Errorf("want %s, got %s (exit %d, %v)", tc.want, got, code, doc)
			}
		})
	}
}

// TestF15_ErrorsLeaveWhole: code, cause and remedy survive wrapping, a panic becomes an error, and all are
// one document.
func TestF15_ErrorsLeaveWhole(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		code float64
		want string
	}{
		{"own, wrapped", fmt.Errorf("connect: %w", cni.Errorf(cni.ErrKernel, "veth: %w", io.EOF).WithDetails("look there")),
			cni.ErrKernel, "connect: veth: EOF"},
		{"plain", errors.New("boom"), cni.ErrInternal, "boom"},
		{"metadata away", cni.FromMetadata(fmt.Errorf("x: %w", metadata.ErrUnreachable)), cni.ErrTryAgain, "unreachable"},
		{"held", cni.FromMetadata(&metadata.Error{Code: metadata.CodeHeld, Message: "10.42.0.5 is held by x/eth0"}),
			cni.ErrAddressHeld, "held by x/eth0"},
		{"exhausted", cni.FromMetadata(&metadata.Error{Code: metadata.CodeExhausted, Message: "62 used, 0 free"}),
			cni.ErrExhausted, "62 used"},
		{"not yet", cni.FromMetadata(&metadata.Error{Code: metadata.CodeNotYet, Message: "unknown after 10s"}),
			cni.ErrTryAgain, "after 10s"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := plugin{do: func(*cni.Request) error { return tc.err }}
			doc, n, code := p.run(env("ADD"), config("1.1.0", ""))
			if code != 1 || n != 1 || doc["code"] != tc.code || !strings.Contains(doc["msg"].(string), tc.want) {
				t.Errorf("exit %d, %d documents, %v", code, n, doc)
			}
		})
	}
	p := plugin{do: func(*cni.Request) error { panic("at the disco") }}
	doc, n, code := p.run(env("ADD"), config("1.0.0", ""))
	if code != 1 || n != 1 || doc["code"] != float64(cni.ErrInternal) || doc["cniVersion"] != "1.0.0" ||
		!strings.Contains(doc["msg"].(string), "at the disco") {
		t.Errorf("panic: exit %d, %d documents, %v", code, n, doc)
	}
}

// TestNilVerbIsAnError: a verb that nobody wrote must not claim success.
func TestNilVerbIsAnError(t *testing.T) {
	for _, verb := range []string{"ADD", "DEL", "CHECK", "STATUS", "GC"} {
		var out bytes.Buffer
		e := env(verb)
		code := cni.Plugin{Name: "empty"}.Run(func(k string) string { return e[k] }, strings.NewReader(config("1.1.0", "")),
			&out, io.Discard)
		if code != 1 || !strings.Contains(out.String(), "not implemented") {
			t.Errorf("%s: exit %d, %s", verb, code, out.String())
		}
	}
}

// TestF11_F131_WhatTheCallerAsksFor: capability before args.cni before CNI_ARGS.
func TestF11_F131_WhatTheCallerAsksFor(t *testing.T) {
	for _, tc := range []struct{ name, conf, args, ips, mac string }{
		{"nothing", ``, ``, "[]", ""},
		{"CNI_ARGS", ``, "IP=10.42.0.9;MAC=0A:00:00:00:00:09", "[10.42.0.9/32]", "0a:00:00:00:00:09"},
		{"Rancher's", ``, "IPAddress=10.42.0.9/16;MACAddress=0a:00:00:00:00:09", "[10.42.0.9/16]", "0a:00:00:00:00:09"},
		{"args.cni", `"args":{"cni":{"ips":["10.42.0.8"],"mac":"0a:00:00:00:00:08"}},`, "IP=10.42.0.9;MAC=0a:00:00:00:00:09",
			"[10.42.0.8/32]", "0a:00:00:00:00:08"},
		{"capabilities", `"runtimeConfig":{"ips":["10.42.0.7/24","fd42::7"],"mac":"0a:00:00:00:00:07"},"args":{"cni":{"ips":["10.42.0.8"]}},`, "", "[10.42.0.7/24 fd42::7/128]", "0a:00:00:00:00:07"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := plugin{do: func(r *cni.Request) error {
				ips, err := r.Addresses()
				if err != nil {
					return err
				}
				mac, err := r.MAC()
				if err != nil {
					return err
				}
				macText, _ := mac.MarshalText()
				if fmt.Sprint(ips) != tc.ips || string(macText) != tc.mac {
					t.Errorf("want %s %s, got %v %s", tc.ips, tc.mac, ips, macText)
				}
				return nil
			}}
			if doc, _, code := p.run(env("ADD", "CNI_ARGS="+tc.args), config("1.1.0", tc.conf)); code != 0 {
				t.Fatal(doc)
			}
		})
	}
	for _, bad := range []string{"IP=nonsense", "MAC=nonsense", "MAC=01:00:5e:00:00:01"} {
		p := plugin{do: func(r *cni.Request) error {
			if _, err := r.Addresses(); err != nil {
				return err
			}
			_, err := r.MAC()
			return err
		}}
		if doc, _, code := p.run(env("ADD", "CNI_ARGS="+bad), config("1.1.0", "")); code != 1 ||
			doc["code"] != float64(cni.ErrConfig) {
			t.Errorf("%s: exit %d, %v", bad, code, doc)
		}
	}
}

// TestNames: who a container is, for people and for service discovery, by what its runtime says.
func TestNames(t *testing.T) {
	const alloc = "153ff1d7-8e2a-4b6f-9c11-2f6e0c7d9a10"
	for _, tc := range []struct{ args, name, uuid, labels string }{
		{"IgnoreUnknown=true;NOMAD_REGION=global;NOMAD_NAMESPACE=default;NOMAD_JOB_ID=five;" +
			"NOMAD_GROUP_NAME=grp;NOMAD_ALLOC_ID=" + alloc,
			"five/grp/153ff1d7", alloc,
			"nomad.alloc=" + alloc + " nomad.group=grp nomad.job=five nomad.namespace=default nomad.region=global"},
		{"NOMAD_JOB_ID=five;NOMAD_GROUP_NAME=grp", "five/grp", "", "nomad.group=grp nomad.job=five"},
		{"NOMAD_GROUP_NAME=grp;NOMAD_ALLOC_ID=" + alloc, "grp/153ff1d7", alloc, // the job's id has a semicolon
			"nomad.alloc=" + alloc + " nomad.group=grp"},
		{"NOMAD_ALLOC_ID=" + alloc, "153ff1d7", alloc, "nomad.alloc=" + alloc},
		{"K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_UID=u", "ns/web-0", "u",
			"io.kubernetes.pod.name=web-0 io.kubernetes.pod.namespace=ns io.kubernetes.pod.uid=u"},
		{"CONTAINER_NAME=web", "web", "", ""},
	} {
		var got []string
		p := plugin{do: func(r *cni.Request) error {
			name, uuid, labels := r.Owner()
			if name != tc.name || uuid != tc.uuid {
				t.Errorf("%s: name %q, uuid %q, want %q, %q", tc.args, name, uuid, tc.name, tc.uuid)
			}
			shown := metadata.PublicLabels(labels, nil)
			for _, k := range slices.Sorted(maps.Keys(shown)) {
				got = append(got, k+"="+shown[k])
			}
			return nil
		}}
		doc, _, code := p.run(env("ADD", "CNI_ARGS="+tc.args), config("1.1.0", ""))
		if code != 0 || strings.Join(got, " ") != tc.labels {
			t.Errorf("%s: exit %d, %v: %q, want %q", tc.args, code, doc, got, tc.labels)
		}
	}
}

// TestAnnotations: those of services become labels, and those that the configuration names. Others may hold secrets.
func TestAnnotations(t *testing.T) {
	const annotations = `"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"lariat.service":"web","team":"red","example.org/a":"1",` +
		`"kubectl.kubernetes.io/last-applied-configuration":"hunter2"}}`
	for _, tc := range []struct{ more, args, want string }{
		{"", "", "lariat.service=web"},
		{`"annotations":["team"],`, "", "lariat.service=web team=red"},
		{`"annotations":["example.org/*"],`, "", "example.org/a=1 lariat.service=web"},
		{`"annotations":["tea"],`, "K8S_POD_NAME=p", "io.kubernetes.pod.name=p lariat.service=web"},
		{`"args":{"cni":{"labels":{"mine":"x"}}},`, "", "lariat.service=web mine=x"},
		{`"args":{"cni":{"labels":null}},`, "", "lariat.service=web"},
	} {
		var got []string
		p := plugin{do: func(r *cni.Request) error {
			_, _, labels := r.Owner()
			for _, k := range slices.Sorted(maps.Keys(labels)) {
				got = append(got, k+"="+labels[k])
			}
			return nil
		}}
		if doc, _, code := p.run(env("ADD", "CNI_ARGS="+tc.args), config("1.1.0", tc.more+annotations+",")); code != 0 ||
			strings.Join(got, " ") != tc.want {
			t.Errorf("%s: exit %d, %v: %q, want %q", tc.more, code, doc, got, tc.want)
		}
	}
}

func FuzzRun(f *testing.F) {
	f.Add(config("1.1.0", ""), "ADD", "IP=10.42.0.9")
	f.Add(config("0.3.1", `"runtimeConfig":{"ips":["x"]},`), "DEL", ";;=")
	f.Add(config("1.1.0", `"args":{"cni":{"labels":null}},"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"lariat.stack":"s"}},`), "ADD", "")
	f.Add(`{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":{}}`, "GC", "")
	f.Fuzz(func(t *testing.T, stdin, verb, args string) {
		p := plugin{do: func(r *cni.Request) error {
			r.Owner()
			_, e1 := r.Addresses()
			_, e2 := r.MAC()
			return errors.Join(e1, e2)
		}}
		doc, n, code := p.run(env(verb, "CNI_ARGS="+args), stdin)
		if n > 1 || code == 1 && (n != 1 || doc["code"] == nil ||
			!slices.Contains(cni.Versions, fmt.Sprint(doc["cniVersion"]))) {
			t.Fatalf("exit %d, %d documents, %v", code, n, doc)
		}
	})
}
