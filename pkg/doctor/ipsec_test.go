package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// encryptedHost is a host of four with two encrypted networks and a VXLAN one, where all is well; each case
// spoils one thing.
func encryptedHost(t testing.TB) *Facts {
	t.Helper()
	read := func(file string, v any) {
		b, err := os.ReadFile("../../helpers/lariat/testdata/" + file)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	f := healthy(t)
	var s metadata.Snapshot
	read("ipsec.json", &s)
	for i := range s.Hosts {
		s.Hosts[i].IKEKeys = []string{"5f0c1d2e"}
	}
	f.Metadata.Snapshot = &s
	f.Manager.Tunnels = &ipsec.Report{}
	read("ipsec.tunnels.json", f.Manager.Tunnels)
	for i := range f.Manager.Tunnels.Tunnels {
		f.Manager.Tunnels.Tunnels[i].LastError = ""
	}
	f.Secret = &SecretFile{Path: "/etc/lariat/ipsec.secret", There: true, Mode: 0o600}
	want := ipsec.Plan(&s, "h1")
	for name, l := range want.Links {
		_, text, _ := strings.Cut(delta.LinkString(name, l), name+" ")
		f.Kernel.Devices = append(f.Kernel.Devices, Device{Name: name, Want: text, Have: text})
	}
	f.Kernel.Chains = chains(want, want)
	f.Peers = nil
	for i, addr := range []string{"192.0.2.2", "192.0.2.3", "198.51.100.4"} {
		p := Peer{Host: fmt.Sprintf("h%d", i+2), Addr: netip.MustParseAddr(addr), RTT: time.Millisecond, WantMTU: 1500,
			MTU: 1500}
		for n, third := range map[string]byte{"overlay": 42, "payroll": 44} {
			ours := netip.AddrFrom4([4]byte{10, third, 1, 1})
			o := Overlay{Network: n, Port: 4789, Gateway: netip.AddrFrom4([4]byte{10, third, byte(i + 2), 1}), Ours: ours,
				Source: ours}
			if n == "payroll" {
				o.Port = 0
			}
			p.Overlay = append(p.Overlay, o)
		}
		f.Peers = append(f.Peers, p)
	}
	return f
}

func TestF137HealthyEncryptedHostHasNoFinding(t *testing.T) {
	r := Check(encryptedHost(t))
	if len(r.Findings)+len(r.Skipped) != 0 || len(r.Passed) != len(checks) || r.ExitStatus() != 0 {
		t.Errorf("%+v", r)
	}
}

func TestF137FindingsOfEncryptedNetworks(t *testing.T) {
	failed := func(peer int, text string) func(*Facts) {
		return func(f *Facts) {
			f.Manager.Tunnels.Tunnels[peer].LastError = text
			for i := range f.Peers[peer].Overlay { // nothing passes either, which is told once
				if o := &f.Peers[peer].Overlay[i]; o.Port == 0 {
					o.Err = errors.New("no reply")
				}
			}
		}
	}
	for _, tc := range []struct {
		name   string
		spoil  func(f *Facts)
		want   string
		remedy string
	}{
		{"kernel without ESP", func(f *Facts) {
			f.Features = []Feature{{Name: "ESP", Encap: "ipsec", Outer: 4, Need: "x", Remedy: "modprobe esp4"}}
		}, "features error: the kernel cannot do ESP", "modprobe esp4"},
		{"kernel without AES-GCM", func(f *Facts) {
			f.Features = []Feature{{Name: "AES-GCM", Encap: "ipsec", Fallback: true, Need: "AES-CBC is used",
				Remedy: "modprobe gcm"}}
		}, "features warning: the kernel cannot do AES-GCM", "modprobe gcm"},
		{"secret missing", func(f *Facts) {
			f.Manager.Tunnels = &ipsec.Report{Networks: []string{"payroll"},
				Missing: "secret of the encrypted networks: no such file", Remedy: "lariat ipsec secret"}
		}, "ipsec error: this host cannot encrypt: secret of the encrypted networks", "lariat ipsec secret"},
		{"daemon down", func(f *Facts) {
			f.Manager.Tunnels.Problem, f.Manager.Tunnels.Remedy = "charon does not run", "apt-get install charon-systemd"
			for i := range f.Manager.Tunnels.Tunnels {
				f.Manager.Tunnels.Tunnels[i].State = ipsec.StateDown
			}
			for i := range f.Peers {
				for j := range f.Peers[i].Overlay {
					if o := &f.Peers[i].Overlay[j]; o.Port == 0 {
						o.Err = errors.New("no reply")
					}
				}
			}
		}, "ipsec error: this host's tunnels are not kept: charon does not run", "apt-get install charon-systemd"},
		// As pkg/ike words them.
		{"other secret", failed(1, "the peer says AUTHENTICATION_FAILED: its key or certificate does not match; do both "+
			"hosts have the same secret?"),
			"ipsec error: no tunnel to host h3: the peer says AUTHENTICATION_FAILED",
			"compare the KEYS that lariat ipsec status shows"},
		{"other secret here", failed(1, "authentication failed: the peer's key does not match; do both hosts have the "+
			"same secret?"), "ipsec error: no tunnel to host h3: authentication failed", "lariat ipsec rotate"},
		{"certificate expired", failed(1, "subject certificate invalid: not valid"),
			"ipsec error: no tunnel to host h3: subject certificate", "certificates of different authorities"},
		{"no common suite", failed(1, "the peer says NO_PROPOSAL_CHOSEN: it has no suite in common, or does not know "+
			"this host yet"), "ipsec error: no tunnel to host h3: the peer says NO_PROPOSAL_CHOSEN", "compare the SUITES"},
		{"no common suite here", failed(1, "no acceptable ENCRYPTION_ALGORITHM found"),
			"ipsec error: no tunnel to host h3: no acceptable", "compare the SUITES"},
		{"other subnets", failed(2, "the peer says TS_UNACCEPTABLE: the network has other subnets there"),
			"ipsec error: no tunnel to host h4: the peer says TS_UNACCEPTABLE", "lariat network list"},
		{"other subnets here", failed(2, "no acceptable traffic selectors found"),
			"ipsec error: no tunnel to host h4: no acceptable traffic selectors", "lariat network list"},
		{"IKE blocked", failed(2, "no answer: gave up after 5 retransmits; is UDP 500 and 4500 open between the hosts, "+
			"and charon running there?"), "ipsec error: no tunnel to host h4: no answer: gave up after 5 retransmits",
			"open UDP 500 and 4500 and ESP (IP protocol 50)"},
		{"what nobody foresaw", failed(2, "100% odd"), "ipsec error: no tunnel to host h4: 100% odd", "journalctl"},
		{"trouble with a tunnel that stands",
			func(f *Facts) { f.Manager.Tunnels.Tunnels[0].LastError = "NO_PROPOSAL_CHOSEN" },
			"ipsec warning: trouble with the tunnel to host h2, which stands: NO_PROPOSAL", "SUITES"},
		{"daemon without the connection", func(f *Facts) { f.Manager.Tunnels.Tunnels[2].State = ipsec.StateDown },
			"ipsec error: the IKE daemon does not know of a tunnel to host h4", "journalctl"},
		{"secret that others can read", func(f *Facts) { f.Secret.Mode = 0o640 },
			"secret error: others can read the secret of encrypted networks (mode 0640)", "chmod 600 /etc/lariat/ipsec.secret"},
		{"a host without a secret", func(f *Facts) { f.Metadata.Snapshot.Hosts[2].IKEKeys = nil },
			"secret error: host h3 has loaded no secret", "lariat ipsec status"},
		{"a host with another secret", func(f *Facts) { f.Metadata.Snapshot.Hosts[2].IKEKeys = []string{"00000000"} },
			"secret error: host h3 shares no secret with this one, which has 5f0c1d2e, a1b2c3d4", "lariat ipsec rotate"},
		{"rotation unfinished there", func(f *Facts) { f.Metadata.Snapshot.Hosts[2].IKEKeys = []string{"a1b2c3d4"} },
			"secret warning: a rotation of the secret is unfinished: host h3 does not use 5f0c1d2e first", "--finish"},
		{"blocking rules gone", func(f *Facts) {
			for i := range f.Kernel.Chains {
				f.Kernel.Chains[i].Have = ""
			}
		}, "rules error: rules that keep containers, networks and the underlay apart are missing: chain clear-out",
			"start lariat-network-manager"},
		{"a blocking rule changed", func(f *Facts) { f.Kernel.Chains[0].Have = "chain …" },
			"rules error: rules that keep containers, networks and the underlay apart are not as they should be: chain " +
				"clear-out", "nft flush ruleset"},
		{"policies off on the underlay", func(f *Facts) { f.Kernel.Sysctls["net/ipv4/conf/eth0/disable_policy"] = "1" },
			"fail-closed error: the kernel does not ask IPsec's policies on eth0: disable_policy is set",
			"sysctl -w net/ipv4/conf/eth0/disable_policy=0"},
		{"policies off on a tunnel", func(f *Facts) {
			f.Kernel.Sysctls["net/ipv4/conf/"+f.Kernel.Devices[len(f.Kernel.Devices)-1].Name+"/disable_xfrm"] = "1"
		}, "fail-closed error: the kernel does not ask IPsec's policies on lrx", "disable_xfrm=0"},
		{"tunnel device gone", func(f *Facts) { f.Kernel.Devices[1].Have = "" }, "devices error: device lrx",
			"start lariat-network-manager"},
		{"ESP blocked", func(f *Facts) {
			for i := range f.Peers[0].Overlay {
				if o := &f.Peers[0].Overlay[i]; o.Port == 0 {
					o.Err = errors.New("no reply")
				}
			}
		}, "tunnel error: host h2 answers over the underlay, but not through the encrypted network payroll",
			"open ESP (IP protocol 50)"},
		{"route to an encrypted network missing", func(f *Facts) {
			for i := range f.Peers[0].Overlay {
				if o := &f.Peers[0].Overlay[i]; o.Port == 0 {
					o.Err, o.Source = errors.New("no reply"), netip.MustParseAddr("192.0.2.1")
				}
			}
		}, "tunnel error: there is no route of network payroll to host h2", "plan --diff"},
		{"MTU too large for ESP", func(f *Facts) { f.Metadata.Snapshot.Networks[1].MTU = 1450 },
			"underlay error: network payroll has an MTU of 1450; encrypted, such packets can have 1524 octets, which do " +
				"not fit the 1500 of eth0", "lariat network update payroll --mtu 1422"},
		{"MTU too small on the way", func(f *Facts) { f.Peers[1].MTU = 1400 },
			"mtu error: packets of 1500 octets, as the tunnels make them, do not come through to host h3",
			"--mtu 1326 (encrypted), --mtu 1350 (VXLAN)"},
		{"manager stopped", func(f *Facts) { f.Manager = &Manager{Err: errors.New("refused")} },
			"manager error: the network manager is not running", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := encryptedHost(t)
			tc.spoil(f)
			r := Check(f)
			var got []string
			for _, x := range r.Findings {
				got = append(got, fmt.Sprintf("%s %s: %s", x.Check, x.Severity, x.What))
				if !strings.Contains(x.Remedy, tc.remedy) {
					t.Errorf("remedy %q does not say %q", x.Remedy, tc.remedy)
				}
				if x.Where == "" {
					t.Error("it does not say where")
				}
			}
			if len(got) != 1 || !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("got %q, want one finding: %s", got, tc.want)
			}
		})
	}
}

func TestF137EncryptedNetworksOfOthersAreNoFinding(t *testing.T) {
	f := healthy(t) // without an encrypted network
	f.Manager.Tunnels = &ipsec.Report{Missing: "esp"}
	f.Features = append(f.Features, Feature{Name: "ESP", Encap: "ipsec"})
	f.Kernel.Chains, f.Kernel.Sysctls["net/ipv4/conf/eth0/disable_xfrm"] = nil, "1"
	if r := Check(f); len(r.Findings)+len(r.Skipped) != 0 {
		t.Errorf("%+v", r)
	}
	// Dead hosts do not answer IKE, as everybody knows.
	f = encryptedHost(t)
	f.Metadata.Snapshot.Hosts[2].Live, f.Metadata.Snapshot.Hosts[2].IKEKeys = false, nil
	f.Manager.Tunnels.Tunnels[1].LastError = "peer does not answer"
	if r := Check(f, "ipsec", "secret"); len(r.Findings)+len(r.Skipped) != 0 {
		t.Errorf("%+v", r)
	}
	// Certificates take the place of the secret.
	f = encryptedHost(t)
	f.Manager.Tunnels.Auth, f.Manager.Tunnels.Keys = ipsec.AuthPubkey, nil
	for i := range f.Metadata.Snapshot.Hosts {
		f.Metadata.Snapshot.Hosts[i].IKEKeys = nil
	}
	if r := Check(f, "secret"); len(r.Findings)+len(r.Skipped) != 0 {
		t.Errorf("%+v", r)
	}
}

func TestF137FeaturesAreNeededByEncapsulationAndUnderlay(t *testing.T) {
	vxlan, esp, esp6 := Feature{Encap: "vxlan"}, Feature{Encap: "ipsec", Outer: 4}, Feature{Encap: "ipsec", Outer: 6}
	s := encryptedHost(t).Metadata.Snapshot
	only := *s
	only.Networks = s.Networks[1:] // encrypted ones alone
	six := only
	six.Hosts = []metadata.Host{{Name: "h1",
		Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix("2001:db8::1/64")}}}}
	for _, tc := range []struct {
		name             string
		s                *metadata.Snapshot
		vxlan, esp, esp6 bool
	}{
		{"nothing known", nil, true, false, false},
		{"no network yet", &metadata.Snapshot{}, true, false, false},
		{"VXLAN alone", healthy(t).Metadata.Snapshot, true, false, false},
		{"both", s, true, true, false},
		{"encrypted alone", &only, false, true, false},
		{"IPv6 underlay", &six, false, false, true},
	} {
		if vxlan.Needed(tc.s) != tc.vxlan || esp.Needed(tc.s) != tc.esp || esp6.Needed(tc.s) != tc.esp6 {
			t.Errorf("%s: VXLAN %t, ESP %t, ESP over IPv6 %t", tc.name, vxlan.Needed(tc.s), esp.Needed(tc.s), esp6.Needed(tc.s))
		}
	}
}

func TestF137WhatWasNotSaidOfTunnelsIsNotFine(t *testing.T) {
	f := encryptedHost(t)
	f.Manager.Tunnels, f.Secret = nil, nil
	f.Unavailable = map[string]string{"tunnels": "the network manager is older", "secret": "secret file: not for you",
		"devices": "not root"}
	for i := range f.Metadata.Snapshot.Hosts {
		f.Metadata.Snapshot.Hosts[i].IKEKeys = nil
	}
	r := Check(f, "ipsec", "secret", "fail-closed")
	var why []string
	for _, s := range r.Skipped {
		why = append(why, s.Check+": "+s.Why)
	}
	if got := strings.Join(why, "\n"); len(r.Passed) != 0 ||
		got != "ipsec: the network manager is older\nsecret: secret file: not for you\nsecret: this host has not "+
			"announced a secret\nfail-closed: not root" {
		t.Errorf("%s\n%+v", got, r)
	}
}

func TestF137ManyTunnelsThatFailMakeOneFinding(t *testing.T) {
	f := encryptedHost(t)
	one := f.Manager.Tunnels.Tunnels[2]
	one.LastError = "peer does not answer"
	f.Manager.Tunnels.Tunnels, f.Peers = nil, nil
	for i := range 40 {
		name := fmt.Sprintf("n%d", i)
		one.Peer = name
		f.Manager.Tunnels.Tunnels = append(f.Manager.Tunnels.Tunnels, one)
		f.Metadata.Snapshot.Hosts = append(f.Metadata.Snapshot.Hosts,
			metadata.Host{Name: name, Live: true, IKEKeys: []string{"5f0c1d2e"}})
		f.Kernel.Devices = append(f.Kernel.Devices, Device{Name: fmt.Sprintf("lrx%06x", i), Want: "x"})
		f.Peers = append(f.Peers, Peer{Host: name, Overlay: []Overlay{{Network: "payroll", Err: errors.New("lost")}}})
	}
	r := Check(f, "ipsec", "tunnel", "devices")
	var got []string
	for _, x := range r.Findings {
		got = append(got, x.What)
	}
	if strings.Join(got, "\n") != "40 devices are missing\nno tunnels to 40 hosts: peer does not answer" &&
		strings.Join(got, "\n") != "no tunnels to 40 hosts: peer does not answer\n40 devices are missing" {
		t.Errorf("%q", got)
	}
}
