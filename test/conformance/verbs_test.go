package conformance_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/probe"
)

// needs are those of lariat-vxlan.
func needs(t testing.TB) {
	t.Helper()
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.NftFib,
		probe.NftNAT, probe.IPv6)
}

// TestF2_F3_F6_F7_EveryVerbInEveryVersion goes through the life of an attachment in each version of the specification.
func TestF2_F3_F6_F7_EveryVerbInEveryVersion(t *testing.T) {
	needs(t)
	for _, exe := range []string{vxlan, ipam} {
		for _, version := range cni.Versions {
			t.Run(exe+" "+version, func(t *testing.T) {
				h := host(t, 0)
				before := world(t, h)
				c := container(t, h)
				conf := configuration(h, exe, version)
				call := func(verb string) map[string]string { return environment(verb, c, nil) }

				var v struct {
					CNIVersion        string   `json:"cniVersion"`
					SupportedVersions []string `json:"supportedVersions"`
				}
				must(t, json.Unmarshal([]byte(succeeds(t, h, exe, text(t, conf), call("VERSION")).Stdout), &v))
				if !slices.Equal(v.SupportedVersions, []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}) || v.CNIVersion != version {
					t.Errorf("VERSION: %+v", v)
				}
				if version == "1.1.0" {
					succeeds(t, h, exe, text(t, conf), call("STATUS"))
				} else {
					fails(t, h, exe, text(t, conf), call("STATUS"), cni.ErrIncompatibleVersion, "STATUS", "1.1.0")
					fails(t, h, exe, text(t, conf), call("GC"), cni.ErrIncompatibleVersion, "GC", "1.1.0")
				}
				unchanged(t, h, before)

				first := succeeds(t, h, exe, text(t, conf), call("ADD"))
				shape(t, first.Stdout, version, exe, c.Path)
				added := world(t, h)
				if again := succeeds(t, h, exe, text(t, conf), call("ADD")); again.Stdout != first.Stdout {
					t.Errorf("F3: the second ADD said %s, the first %s", again.Stdout, first.Stdout)
				}
				unchanged(t, h, added)

				with := configuration(h, exe, version)
				with["prevResult"] = json.RawMessage(first.Stdout)
				if version == "0.3.1" {
					fails(t, h, exe, text(t, with), call("CHECK"), cni.ErrIncompatibleVersion, "CHECK", "0.4.0")
				} else {
					succeeds(t, h, exe, text(t, with), call("CHECK"))
					fails(t, h, exe, text(t, conf), call("CHECK"), cni.ErrConfig, "prevResult")
				}
				unchanged(t, h, added)

				if version == "1.1.0" {
					gc := configuration(h, exe, version)
					for _, list := range []any{nil, []object{{"containerID": c.ID, "ifname": "eth0"},
						{"containerID": "another", "ifname": "eth0"}}} {
						if list != nil {
							gc["cni.dev/valid-attachments"] = list
						}
						succeeds(t, h, exe, text(t, gc), call("GC"))
						unchanged(t, h, added)
					}
				}
				succeeds(t, h, exe, text(t, with), call("DEL"))
				unchanged(t, h, before)
				for _, netns := range []string{c.Path, "", "-", "/run/netns/vanished"} {
					succeeds(t, h, exe, text(t, conf), environment("DEL", c, map[string]string{"CNI_NETNS": netns}))
				}
				unchanged(t, h, before)

				// DEL after the container's namespace has gone, and without one, which is how containerd calls the second time.
				for _, netns := range []string{"", "-", "/run/netns/vanished"} {
					succeeds(t, h, exe, text(t, conf), call("ADD"))
					succeeds(t, h, exe, text(t, conf), environment("DEL", c, map[string]string{"CNI_NETNS": netns}))
					unchanged(t, h, before)
				}
				if version == "1.1.0" {
					for _, list := range []string{"[]", "null"} { // null is CRI-O's way to write an empty list
						succeeds(t, h, exe, text(t, conf), call("ADD"))
						gc := configuration(h, exe, version)
						gc["cni.dev/valid-attachments"] = json.RawMessage(list)
						succeeds(t, h, exe, text(t, gc), call("GC"))
						unchanged(t, h, before)
					}
				}
			})
		}
	}
}

// TestADDInAnotherNamespace: a container's addresses and interface are not given to another
// namespace while its own is there.
func TestADDInAnotherNamespace(t *testing.T) {
	needs(t)
	for _, exe := range []string{vxlan, ipam} {
		h := host(t, 0)
		before := world(t, h)
		c, other := container(t, h), container(t, h)
		conf := text(t, configuration(h, exe, "1.1.0"))
		succeeds(t, h, exe, conf, environment("ADD", c, nil))
		added := world(t, h)
		moved := environment("ADD", c, map[string]string{"CNI_NETNS": other.Path})
		fails(t, h, exe, conf, moved, cni.ErrKernel, c.ID+"/eth0", "in use")
		unchanged(t, h, added)
		succeeds(t, h, exe, conf, environment("DEL", c, nil))
		unchanged(t, h, before)
	}
}

// TestF7_GCByTheOlderKey: cni.dev/attachments was the key in drafts of 1.1, and libcni sends both.
func TestF7_GCByTheOlderKey(t *testing.T) {
	needs(t)
	h := host(t, 0)
	before := world(t, h)
	keep, drop := container(t, h), container(t, h)
	conf := configuration(h, vxlan, "1.1.0")
	succeeds(t, h, vxlan, text(t, conf), environment("ADD", keep, nil))
	one := world(t, h)
	succeeds(t, h, vxlan, text(t, conf), environment("ADD", drop, nil))
	conf["cni.dev/attachments"] = []object{{"containerID": keep.ID, "ifname": "eth0"}}
	succeeds(t, h, vxlan, text(t, conf), environment("GC", keep, nil))
	unchanged(t, h, one)
	succeeds(t, h, vxlan, text(t, conf), environment("DEL", keep, nil))
	unchanged(t, h, before)
}

// shape holds a result to the schema of its version: no key that the version does not know, every index right.
func shape(t *testing.T, stdout, version, exe, netns string) {
	t.Helper()
	ip := []string{"address", "gateway"}
	iface, route := []string{"name", "mac", "sandbox"}, []string{"dst", "gw"}
	if version < "1.0.0" {
		ip = append(ip, "version")
	}
	if version >= "1.1.0" {
		iface = append(iface, "mtu", "socketPath", "pciID")
		route = append(route, "mtu", "advmss", "priority", "table", "scope")
	}
	top := []string{"cniVersion", "ips", "routes", "dns"}
	if exe == vxlan {
		top, ip = append(top, "interfaces"), append(ip, "interface")
	}
	var doc object
	must(t, json.Unmarshal([]byte(stdout), &doc))
	only(t, "the result", doc, top)
	if doc["cniVersion"] != version {
		t.Errorf("cniVersion %v, want %s", doc["cniVersion"], version)
	}
	list := func(key string, known []string) (out []object) {
		l, _ := doc[key].([]any)
		for _, x := range l {
			out = append(out, x.(object))
			only(t, key, x.(object), known)
		}
		return out
	}
	interfaces := list("interfaces", iface)
	if exe == vxlan && (len(interfaces) != 2 || interfaces[1]["name"] != "eth0" || interfaces[1]["sandbox"] != netns ||
		interfaces[0]["sandbox"] != nil) {
		t.Errorf("want the host's end and eth0 in %s: %v", netns, interfaces)
	}
	for _, i := range interfaces {
		if i["mac"] == nil || version == "1.1.0" && i["mtu"] != 1450.0 {
			t.Errorf("interface without its mac, or in 1.1.0 its mtu 1450: %v", i)
		}
	}
	ips := list("ips", ip)
	if len(ips) != 2 {
		t.Fatalf("want an IPv4 and an IPv6 address: %s", stdout)
	}
	for n, i := range ips {
		p, err := netip.ParsePrefix(i["address"].(string))
		if err != nil || p.Addr().Is6() != (n == 1) {
			t.Errorf("address %v: %v", i["address"], err)
		}
		if want := fmt.Sprint(4 + 2*n); version < "1.0.0" && i["version"] != want {
			t.Errorf("%s is of version %s, the result says %v", p, want, i["version"])
		}
		if exe == vxlan && (i["interface"] != 1.0 || !p.IsSingleIP()) {
			t.Errorf("address %v: want a single one on the interface with index 1", i)
		}
	}
	routes := list("routes", route)
	if exe == vxlan && len(routes) != 2 {
		t.Errorf("want a default route of each family: %v", routes)
	}
}

func only(t *testing.T, what string, doc object, known []string) {
	t.Helper()
	for key := range doc {
		if !slices.Contains(known, key) {
			t.Errorf("%s: key %q is not of this version", what, key)
		}
	}
}

// TestF2_RoutesOf11StayIn11: a route's MTU, table and priority are of 1.1.
func TestF2_RoutesOf11StayIn11(t *testing.T) {
	needs(t)
	for _, exe := range []string{vxlan, ipam} {
		for _, version := range cni.Versions {
			h := host(t, 0)
			c := container(t, h)
			conf := configuration(h, exe, version)
			conf["ipam"].(object)["routes"] = []object{{"dst": "10.99.0.0/16", "mtu": 1300, "advmss": 1200, "priority": 5,
				"table": 7}}
			var doc struct{ Routes []object }
			must(t, json.Unmarshal([]byte(succeeds(t, h, exe, text(t, conf), environment("ADD", c, nil)).Stdout), &doc))
			last := doc.Routes[len(doc.Routes)-1]
			if last["dst"] != "10.99.0.0/16" {
				t.Errorf("%s %s: the route is not there: %v", exe, version, doc.Routes)
			}
			if new := last["mtu"] == 1300.0 && last["advmss"] == 1200.0 && last["priority"] == 5.0 &&
				last["table"] == 7.0; version == "1.1.0" && !new {
				t.Errorf("%s %s: %v", exe, version, last)
			}
			if version != "1.1.0" {
				only(t, "route", last, []string{"dst", "gw"})
			}
			succeeds(t, h, exe, text(t, conf), environment("DEL", c, nil))
		}
	}
}

// TestF2_Index: as the second of a chain, the result has the first one's interfaces in front, and the indices count on.
func TestF2_Index(t *testing.T) {
	needs(t)
	h := host(t, 0)
	before := world(t, h)
	c := container(t, h)
	conf := configuration(h, vxlan, "1.1.0")
	conf["prevResult"] = json.RawMessage(`{"cniVersion":"1.1.0","interfaces":[{"name":"lo","sandbox":"` + c.Path +
		`"}],"ips":[{"interface":0,"address":"127.0.0.1/8"}]}`)
	var doc struct {
		Interfaces []struct{ Name string }
		IPs        []struct {
			Interface int
			Address   string
		}
	}
	must(t, json.Unmarshal([]byte(succeeds(t, h, vxlan, text(t, conf), environment("ADD", c, nil)).Stdout), &doc))
	if len(doc.Interfaces) != 3 || len(doc.IPs) != 3 || doc.Interfaces[0].Name != "lo" || doc.IPs[0].Interface != 0 ||
		doc.Interfaces[doc.IPs[1].Interface].Name != "eth0" || doc.Interfaces[doc.IPs[2].Interface].Name != "eth0" {
		t.Errorf("%+v", doc)
	}
	succeeds(t, h, vxlan, text(t, conf), environment("DEL", c, nil))
	unchanged(t, h, before)
}

// TestF10_F15_Mistakes: each is refused with its code, by one document, and leaves nothing.
func TestF10_F15_Mistakes(t *testing.T) {
	needs(t)
	h := host(t, 0)
	c := container(t, h)
	plain := filepath.Join(t.TempDir(), "plain")
	must(t, os.WriteFile(plain, nil, 0o600))
	set := func(key string, value any) func(object) { return func(o object) { o[key] = value } }
	in := func(key string, value any) func(object) {
		return func(o object) { o["ipam"].(object)[key] = value }
	}
	env := func(pairs ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	prev := json.RawMessage(`{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"interface":0,"address":"10.42.0.9/32"}]}`)
	for _, tc := range []struct {
		name  string
		exe   string // "": both
		verbs []string
		raw   string // instead of a configuration
		edit  func(object)
		env   map[string]string
		code  uint
		words []string
	}{
		{name: "is not JSON", verbs: []string{"ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"},
			raw: "{\"cniVersion\": \"1.1.0\",\n \"name\": overlay}", code: cni.ErrDecode, words: []string{"line 2"}},
		{name: "is empty", verbs: []string{"ADD", "DEL", "CHECK", "STATUS", "GC"}, raw: " ", code: cni.ErrDecode},
		{name: "is cut off", verbs: []string{"ADD", "DEL"}, raw: `{"cniVersion": "1.1.0", "name": "over`,
			code: cni.ErrDecode},
		{name: "is two documents", verbs: []string{"ADD", "DEL"}, raw: `{"cniVersion": "1.1.0"} {}`, code: cni.ErrDecode},
		{name: "is a list", verbs: []string{"ADD", "DEL"}, raw: `[]`, code: cni.ErrConfig},
		{name: "speaks a version of the future", verbs: []string{"ADD", "DEL", "CHECK", "STATUS", "GC"},
			edit: set("cniVersion", "9.9.9"), code: cni.ErrIncompatibleVersion, words: []string{"9.9.9", "1.1.0"}},
		{name: "speaks a version of the past", verbs: []string{"ADD"}, edit: set("cniVersion", "0.2.0"),
			code: cni.ErrIncompatibleVersion, words: []string{"0.2.0"}},
		{name: "speaks no version", verbs: []string{"ADD"}, edit: set("cniVersion", ""), code: cni.ErrIncompatibleVersion},
		{name: "has no name", verbs: []string{"ADD", "DEL", "STATUS", "GC"}, edit: set("name", ""), code: cni.ErrConfig,
			words: []string{"name"}},
		{name: "has a path for a name", verbs: []string{"ADD", "DEL", "GC"}, edit: set("name", "../../etc"),
			code: cni.ErrConfig, words: []string{"name"}},
		{name: "has a number for a name", verbs: []string{"ADD"}, edit: set("name", 7), code: cni.ErrConfig,
			words: []string{"name"}},
		{name: "F10: has an unknown key", exe: vxlan, verbs: []string{"ADD", "STATUS"}, edit: set("mtuu", 1400),
			code: cni.ErrConfig, words: []string{`"mtuu"`, `"mtu"`}},
		{name: "F10: has an unknown key far from all", exe: vxlan, verbs: []string{"ADD"}, edit: set("zzzzzzzzzzz", 1400),
			code: cni.ErrConfig, words: []string{`"zzzzzzzzzzz"`}},
		{name: "F10: has an unknown key of the ipam block", verbs: []string{"ADD", "STATUS"}, edit: in("waitSecond", 3),
			code: cni.ErrConfig, words: []string{`"ipam.waitSecond"`, `"ipam.waitSeconds"`}},
		{name: "F10: has a word for a number", exe: vxlan, verbs: []string{"ADD"}, edit: set("mtu", "1400"),
			code: cni.ErrConfig, words: []string{"mtu"}},
		{name: "F10: has a number for a word", exe: vxlan, verbs: []string{"ADD"}, edit: set("socket", 7),
			code: cni.ErrConfig, words: []string{"socket"}},
		{name: "F10: has a list for the ipam block", exe: vxlan, verbs: []string{"ADD"}, edit: set("ipam", []string{}),
			code: cni.ErrConfig, words: []string{"ipam"}},
		{name: "F10: has a word for a number of the ipam block", verbs: []string{"ADD"}, edit: in("waitSeconds", "3"),
			code: cni.ErrConfig, words: []string{"waitSeconds"}},
		{name: "F10: says mtu and linkMTUOverhead", exe: vxlan, verbs: []string{"ADD"},
			edit: func(o object) { o["mtu"], o["linkMTUOverhead"] = 1400, 50 }, code: cni.ErrConfig,
			words: []string{`"mtu"`, `"linkMTUOverhead"`}},
		{name: "F10: says subnet and subnets", verbs: []string{"ADD"}, edit: func(o object) {
			o["ipam"].(object)["subnet"], o["ipam"].(object)["subnets"] = "10.1.0.0/16", []string{"10.2.0.0/16"}
		}, code: cni.ErrConfig, words: []string{`"subnet"`, `"subnets"`}},
		{name: "F10: has an MTU that is none", exe: vxlan, verbs: []string{"ADD"}, edit: set("mtu", 70000),
			code: cni.ErrConfig, words: []string{"70000"}},
		{name: "F10: waits too long", verbs: []string{"ADD"}, edit: in("waitSeconds", 601), code: cni.ErrConfig,
			words: []string{"waitSeconds", "601"}},
		{name: "F10: has a subnet that is none", verbs: []string{"ADD"}, edit: in("subnet", "10.1.0.0/99"),
			code: cni.ErrConfig, words: []string{"subnet"}},
		{name: "F10: has a prefix length that is none", exe: ipam, verbs: []string{"ADD"}, edit: in("subnetPrefixSize", "24"),
			code: cni.ErrConfig, words: []string{"subnetPrefixSize", `"24"`}},
		{name: "F10: names another network for the addresses", exe: vxlan, verbs: []string{"ADD"},
			edit: in("network", "other"), code: cni.ErrConfig, words: []string{"other", "overlay"}},
		{name: "has no ipam block", verbs: []string{"ADD", "DEL", "STATUS"}, edit: func(o object) { delete(o, "ipam") },
			code: cni.ErrConfig, words: []string{"ipam.type"}},
		{name: "has an ipam plugin with a path", exe: vxlan, verbs: []string{"ADD", "DEL"},
			edit: set("ipam", object{"type": "../lariat-ipam"}), code: cni.ErrConfig, words: []string{"../lariat-ipam"}},
		{name: "has an ipam plugin that is not installed", exe: vxlan, verbs: []string{"ADD"},
			edit: set("ipam", object{"type": "whereabouts"}), code: cni.ErrConfig, words: []string{"whereabouts", "CNI_PATH"}},
		{name: "has an ipam plugin and no CNI_PATH", exe: vxlan, verbs: []string{"ADD"},
			edit: set("ipam", object{"type": "static"}), env: env("CNI_PATH", "-"), code: cni.ErrEnvironment,
			words: []string{"CNI_PATH"}},
		{name: "is for another ipam plugin", exe: ipam, verbs: []string{"ADD", "DEL"},
			edit: set("ipam", object{"type": "static"}), code: cni.ErrConfig, words: []string{"static"}},
		{name: "is of a network that nobody created", verbs: []string{"ADD"}, edit: set("name", "nowhere"),
			code: cni.ErrConfig, words: []string{"nowhere"}},
		{name: "is of a network that nobody created", verbs: []string{"STATUS"}, edit: set("name", "nowhere"),
			code: cni.ErrNotAvailable, words: []string{"nowhere"}},
		{name: "has a prevResult that is none", verbs: []string{"ADD", "CHECK"}, edit: set("prevResult", 7),
			code: cni.ErrDecode, words: []string{"prevResult"}},
		{name: "has a list of attachments that is none", verbs: []string{"GC"}, edit: set("cni.dev/valid-attachments", 7),
			code: cni.ErrConfig, words: []string{"valid-attachments"}},
		{name: "asks for an address that is none", verbs: []string{"ADD"}, env: env("CNI_ARGS", "IP=10.42.0.999"),
			code: cni.ErrConfig, words: []string{"10.42.0.999"}},
		{name: "asks for a MAC that is none", verbs: []string{"ADD"}, env: env("CNI_ARGS", "MAC=01:00:5e:00:00:01"),
			code: cni.ErrConfig, words: []string{"01:00:5e:00:00:01"}},

		{name: "lacks CNI_COMMAND", verbs: []string{"ADD"}, env: env("CNI_COMMAND", "-"), code: cni.ErrEnvironment,
			words: []string{"CNI_COMMAND"}},
		{name: "has an unknown CNI_COMMAND", verbs: []string{"ADD"}, env: env("CNI_COMMAND", "FROB"),
			code: cni.ErrEnvironment, words: []string{"FROB"}},
		{name: "has a CNI_COMMAND in small letters", verbs: []string{"ADD"}, env: env("CNI_COMMAND", "add"),
			code: cni.ErrEnvironment, words: []string{"add"}},
		{name: "lacks CNI_CONTAINERID", verbs: []string{"ADD", "DEL", "CHECK"}, edit: set("prevResult", prev),
			env: env("CNI_CONTAINERID", "-"), code: cni.ErrEnvironment, words: []string{"CNI_CONTAINERID"}},
		{name: "lacks CNI_IFNAME", verbs: []string{"ADD", "DEL", "CHECK"}, edit: set("prevResult", prev),
			env: env("CNI_IFNAME", "-"), code: cni.ErrEnvironment, words: []string{"CNI_IFNAME"}},
		{name: "lacks CNI_NETNS", verbs: []string{"ADD", "CHECK"}, edit: set("prevResult", prev), env: env("CNI_NETNS", "-"),
			code: cni.ErrEnvironment, words: []string{"CNI_NETNS"}},
		{name: "lacks all three", verbs: []string{"ADD"}, env: env("CNI_NETNS", "-", "CNI_IFNAME", "-", "CNI_CONTAINERID",
			"-"), code: cni.ErrEnvironment, words: []string{"CNI_NETNS", "CNI_IFNAME", "CNI_CONTAINERID"}},
		{name: "has a path for a container id", verbs: []string{"ADD", "DEL"}, env: env("CNI_CONTAINERID", "../x"),
			code: cni.ErrEnvironment, words: []string{"../x"}},
		{name: "has an interface name with a slash", verbs: []string{"ADD", "DEL"}, env: env("CNI_IFNAME", "eth/0"),
			code: cni.ErrEnvironment, words: []string{"eth/0"}},
		{name: "has an interface name that is too long", verbs: []string{"ADD"}, env: env("CNI_IFNAME", "sixteencharacter"),
			code: cni.ErrEnvironment, words: []string{"sixteencharacter"}},
		{name: "has CNI_ARGS without a value", verbs: []string{"ADD"}, env: env("CNI_ARGS", "IP"), code: cni.ErrEnvironment,
			words: []string{"IP"}},
		{name: "names the plugin's own namespace", verbs: []string{"ADD", "CHECK"}, edit: set("prevResult", prev),
			env: env("CNI_NETNS", h.Path), code: cni.ErrNetns, words: []string{h.Path}},
		{name: "names the plugin's own namespace by /proc", verbs: []string{"ADD"},
			env: env("CNI_NETNS", "/proc/self/ns/net"), code: cni.ErrNetns},
		{name: "names a namespace that vanished", verbs: []string{"ADD", "CHECK"}, edit: set("prevResult", prev),
			env: env("CNI_NETNS", "/run/netns/vanished"), code: cni.ErrNetns, words: []string{"/run/netns/vanished"}},
		{name: "names a plain file as namespace", verbs: []string{"ADD", "CHECK"}, edit: set("prevResult", prev),
			env: env("CNI_NETNS", plain), code: cni.ErrNetns, words: []string{plain}},
		{name: "names a namespace of another kind", verbs: []string{"ADD"}, env: env("CNI_NETNS", "/proc/self/ns/uts"),
			code: cni.ErrNetns},
		{name: "CHECK of what was never added", verbs: []string{"CHECK"}, edit: set("prevResult", prev), code: cni.ErrConfig,
			words: []string{c.ID}},
	} {
		for _, exe := range []string{vxlan, ipam} {
			if tc.exe != "" && tc.exe != exe {
				continue
			}
			for _, verb := range tc.verbs {
				t.Run(fmt.Sprintf("%s %s %s", exe, verb, tc.name), func(t *testing.T) {
					before := world(t, h)
					conf := tc.raw
					if conf == "" {
						o := configuration(h, exe, "1.1.0")
						if tc.edit != nil {
							tc.edit(o)
						}
						conf = text(t, o)
					}
					fails(t, h, exe, conf, environment(verb, c, tc.env), tc.code, tc.words...)
					unchanged(t, h, before)
				})
			}
		}
	}
}

// TestF6_DELForgives: whatever an ADD would refuse in words and namespaces, DEL and GC do their work.
func TestF6_DELForgives(t *testing.T) {
	needs(t)
	h := host(t, 0)
	plain := filepath.Join(t.TempDir(), "plain")
	must(t, os.WriteFile(plain, nil, 0o600))
	for _, tc := range []struct {
		name string
		edit func(object)
		env  map[string]string
	}{
		{"an unknown key", func(o object) { o["mtuu"] = 7; o["ipam"].(object)["waitSecond"] = 1 }, nil},
		{"a prevResult that is none", func(o object) { o["prevResult"] = 7 }, nil},
		{"a prevResult of null", func(o object) { o["prevResult"] = nil }, nil},
		{"its own namespace", func(object) {}, map[string]string{"CNI_NETNS": h.Path}},
		{"a plain file as namespace", func(object) {}, map[string]string{"CNI_NETNS": plain}},
		{"no CNI_PATH and no CNI_ARGS", func(object) {}, map[string]string{"CNI_PATH": "-", "CNI_ARGS": "-"}},
	} {
		for _, exe := range []string{vxlan, ipam} {
			t.Run(exe+" "+tc.name, func(t *testing.T) {
				before := world(t, h)
				c := container(t, h)
				succeeds(t, h, exe, text(t, configuration(h, exe, "1.1.0")), environment("ADD", c, nil))
				conf := configuration(h, exe, "1.1.0")
				tc.edit(conf)
				succeeds(t, h, exe, text(t, conf), environment("DEL", c, tc.env))
				unchanged(t, h, before)
			})
		}
	}
}
