package ike

import (
	"encoding/base64"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func secrets(t testing.TB, n int) ipsec.Secrets {
	t.Helper()
	var b strings.Builder
	for i := range n {
		fmt.Fprintln(&b, base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "a secret of a test, number %08d", i)))
	}
	s, err := ipsec.ParseSecrets([]byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func tunnel(peer, remote string, keys ...string) ipsec.Tunnel {
	return ipsec.Tunnel{
		Name: ipsec.ConnPrefix + peer, Peer: peer, PeerBoot: "boot-1", Local: netip.MustParseAddr("192.0.2.1"),
		Remote:  netip.MustParseAddr(remote),
		LocalID: "h1", RemoteID: peer, Auth: ipsec.AuthPSK, Keys: keys, Proposals: []string{"aes256gcm16-prfsha256-x25519"},
		Rekey: 4 * time.Hour, DPD: 30 * time.Second,
		Children: []ipsec.Child{{Network: "overlay", IfID: 0x4c000001,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, Proposals: []string{"aes256gcm16-x25519-esn"},
			Rekey: time.Hour}},
	}
}

func wishes(t testing.TB, c Credentials, tunnels ...ipsec.Tunnel) map[string]wish {
	t.Helper()
	out := map[string]wish{}
	for _, x := range tunnels {
		ks, err := keys(x, c)
		if err != nil {
			t.Fatal(err)
		}
		conn := connection(x, c)
		out[x.Name] = wish{tunnel: x, conn: conn, text: conn.String(), keys: ks}
	}
	return out
}

func has(w map[string]wish) map[string]held {
	out := map[string]held{}
	for name, x := range w {
		out[name] = held{tunnel: x.tunnel, conn: x.text, keys: x.keys}
	}
	return out
}

// TestStepsGolden checks the commands to the daemon and their order for each change.
// The golden file holds no key.
func TestStepsGolden(t *testing.T) {
	c := Credentials{Secrets: secrets(t, 2)}
	ids := c.Secrets.IDs()
	base := func() ipsec.Tunnel { return tunnel("h2", "192.0.2.2", ids[0]) }
	change := func(f func(*ipsec.Tunnel)) ipsec.Tunnel {
		x := base()
		x.Children = slices.Clone(x.Children)
		f(&x)
		return x
	}
	held1 := has(wishes(t, c, base()))
	good := func() *observed {
		return &observed{conns: []string{"lariat-h2"}, keys: []string{"lariat-h2-" + ids[0]},
			traps: map[string]bool{"lariat-h2/overlay": true}}
	}
	twice := good()
	twice.sas = map[string][]SA{"lariat-h2": {
		{ID: 7, State: Established, Age: time.Minute, Children: make([]ChildSA, 1)},
		{ID: 8, State: Established, Age: time.Minute, Children: make([]ChildSA, 1)},
	}}
	added := good()
	added.conns, added.keys = append(added.conns, "lariat-x"), append(added.keys, "lariat-x-1")
	untrapped := good()
	untrapped.traps = nil
	cert := base()
	cert.Auth, cert.Keys, cert.Encap = ipsec.AuthPubkey, nil, true
	x509 := Credentials{Certificate: [][]byte{{1}}, CAs: [][]byte{{2}}}
	for _, tc := range []struct {
		name  string
		creds Credentials
		want  []ipsec.Tunnel
		have  map[string]held
		seen  *observed
	}{
		{"a new peer", c, []ipsec.Tunnel{base()}, nil, nil},
		{"with certificates", x509, []ipsec.Tunnel{cert}, nil, nil},
		{"nothing changed", c, []ipsec.Tunnel{base()}, held1, good()},
		{"a peer is gone", c, nil, held1, nil},
		{"another address", c, []ipsec.Tunnel{change(func(x *ipsec.Tunnel) { x.Remote = netip.MustParseAddr("192.0.2.9") })},
			held1, nil},
		{"the peer was booted", c, []ipsec.Tunnel{change(func(x *ipsec.Tunnel) { x.PeerBoot = "boot-2" })}, held1, nil},
		{"another DPD", c, []ipsec.Tunnel{change(func(x *ipsec.Tunnel) { x.DPD = 10 * time.Second })}, held1, nil},
		{"another suite of ESP", c, []ipsec.Tunnel{change(func(x *ipsec.Tunnel) {
			x.Children[0].Proposals = []string{"aes256-sha256-x25519-esn"}
		})}, held1, nil},
		{"a network is gone", c, []ipsec.Tunnel{change(func(x *ipsec.Tunnel) { x.Children = nil })}, held1, nil},
		{"a new key, to be accepted", c, []ipsec.Tunnel{change(func(x *ipsec.Tunnel) { x.Keys = []string{ids[0], ids[1]} })},
			held1, nil},
		{"a new key, to be sent", c, []ipsec.Tunnel{change(func(x *ipsec.Tunnel) { x.Keys = []string{ids[1], ids[0]} })},
			held1, nil},
		{"an old key is dropped", c, []ipsec.Tunnel{base()},
			has(wishes(t, c, change(func(x *ipsec.Tunnel) { x.Keys = []string{ids[0], ids[1]} }))), nil},
		{"set up by both at once", c, []ipsec.Tunnel{base()}, held1, twice},
		{"somebody used our prefix", c, []ipsec.Tunnel{base()}, held1, added},
		{"somebody removed a trap", c, []ipsec.Tunnel{base()}, held1, untrapped},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var b strings.Builder
			for _, s := range steps(wishes(t, tc.creds, tc.want...), tc.have, tc.seen) {
				if s.line != "" {
					fmt.Fprintln(&b, "#", s.line)
				}
				b.WriteString(s.String())
			}
			golden := "testdata/" + strings.NewReplacer(" ", "-", ",", "").Replace(tc.name) + ".steps"
			if *update {
				if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("differs from %s (make update/golden rewrites it):\n%s", golden, b.String())
			}
		})
	}
}

// daemonOrder simulates charon's load-shared and unload-shared.
func daemonOrder(have []string, load []key, unload []string) []string {
	for _, k := range load {
		have = slices.DeleteFunc(have, func(id string) bool { return id == k.id })
		have = append([]string{k.id}, have...)
	}
	return slices.DeleteFunc(have, func(id string) bool { return slices.Contains(unload, id) })
}

// TestF41_KeysOutliveTheirRenewal checks that even short-lived keys outlive a slow exchange.
// Otherwise packets are lost. Both ends request new keys in time, but never at the same time.
// strongSwan 5 loses packets after simultaneous requests.
func TestF41_KeysOutliveTheirRenewal(t *testing.T) {
	number := func(text, field string) time.Duration {
		m := regexp.MustCompile(`(?m)^ *` + field + ` = (\d+)$`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no %s in\n%s", field, text)
		}
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration(n) * time.Second
	}
	for _, rekey := range []time.Duration{10 * time.Second, 10 * time.Minute, time.Hour, 24 * time.Hour} {
		// The values are the first moment and last moment of a request, and the end.
		// They are for both ends, and for the keys of IKE and of a child.
		type times struct{ first, last, end time.Duration }
		var ike, child [2]times
		for i, ids := range [][2]string{{"h1", "h2"}, {"h2", "h1"}} {
			x := tunnel("h2", "192.0.2.2")
			x.LocalID, x.RemoteID = ids[0], ids[1]
			x.Rekey, x.Children[0].Rekey = 4*rekey, rekey
			text, esp := connection(x, Credentials{}).String(), childSection(x.Children[0], leads(x)).String()
			text, _, _ = strings.Cut(text, "children")
			last := number(text, "rekey_time")
			ike[i] = times{last - number(text, "rand_time"), last, last + number(text, "over_time")}
			last = number(esp, "rekey_time")
			child[i] = times{last - number(esp, "rand_time"), last, number(esp, "life_time")}
		}
		for what, ends := range map[string][2]times{"IKE's": ike, "a child's": child} {
			leader, other := ends[0], ends[1]
			const exchange = 20 * time.Second
			if leader.last > 4*rekey || leader.first < rekey*9/10 || other.first-leader.last < exchange ||
				other.end-other.last < exchange || leader.end != other.end {
				t.Errorf("%s keys for %s are renewed at %v by the leader, at %v by the other end", what, rekey, leader, other)
			}
		}
	}
}

// TestF43_KeysEndInOrder checks that after any change the daemon tries keys in the desired order.
func TestF43_KeysEndInOrder(t *testing.T) {
	var all [][]string
	for _, s := range []string{"", "a", "b", "a b", "b a", "c", "a b c", "c b a", "b c a", "c a", "a c", "c a b"} {
		all = append(all, strings.Fields(s))
	}
	made := func(ids []string) (out []key) {
		for _, id := range ids {
			out = append(out, key{id: id})
		}
		return out
	}
	for _, from := range all {
		for _, to := range all {
			var drop []string
			for _, id := range from {
				if !slices.Contains(to, id) {
					drop = append(drop, id)
				}
			}
			load := keysToLoad(made(to), made(from))
			if got := daemonOrder(slices.Clone(from), load, drop); !slices.Equal(got, to) {
				t.Errorf("%v to %v by loading %v: %v", from, to, load, got)
			}
			if slices.Equal(from, to) && len(load) > 0 {
				t.Errorf("%v is as wanted, and %v loaded", from, load)
			}
		}
	}
	// A key with the same id and another content is loaded.
	if load := keysToLoad([]key{{id: "a", digest: [32]byte{1}}}, made([]string{"a"})); len(load) != 1 {
		t.Errorf("a key with other content: %v", load)
	}
}

// TestF43_NoKeyPrints checks that no value with keys prints a key.
func TestF43_NoKeyPrints(t *testing.T) {
	c := Credentials{Secrets: secrets(t, 1), Key: []byte("PRIVATE PRIVATE")}
	x := tunnel("h2", "192.0.2.2", c.Secrets.IDs()[0])
	psk := c.Secrets.Pair(x.Keys[0], x.LocalID, x.RemoteID)
	ks, err := keys(x, c)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, s := range steps(wishes(t, c, x), nil, nil) {
		fmt.Fprintln(&out, s.String(), s.line, explain(s, &failure{"no"}))
	}
	fmt.Fprintf(&out, "%v %+v %#v %s %q %x", c, c, c, c, c, c)
	fmt.Fprintf(&out, "%s", ks[0].args)
	for _, bad := range []string{string(psk), fmt.Sprintf("%x", psk), base64.StdEncoding.EncodeToString(psk),
		"PRIVATE PRIVATE", fmt.Sprintf("%x", "PRIVATE PRIVATE"), "80, 82, 73"} {
		if strings.Contains(out.String(), bad) {
			t.Errorf("prints %q", bad)
		}
	}
	m, err := ks[0].args.message()
	if err != nil || m.Get("data") != string(psk) {
		t.Errorf("what is sent is not the key: %v", err)
	}
}

// TestF43_UnknownSecret checks that the error names the tunnel and the secret.
func TestF43_UnknownSecret(t *testing.T) {
	_, err := keys(tunnel("h2", "192.0.2.2", "00000000"), Credentials{Secrets: secrets(t, 1)})
	if err == nil || !strings.Contains(err.Error(), "lariat-h2") || !strings.Contains(err.Error(), "00000000") {
		t.Errorf("%v", err)
	}
}

// TestF142_OneEndDecides checks that only one end ends a duplicate SA.
// It never does so while an SA has tasks.
func TestF142_OneEndDecides(t *testing.T) {
	a := tunnel("h2", "192.0.2.2")
	b := a
	b.LocalID, b.RemoteID = a.RemoteID, a.LocalID
	sa := func(id uint64, age time.Duration, tasks ...string) SA {
		return SA{ID: id, State: Established, Age: age, Tasks: tasks, Children: make([]ChildSA, 1)}
	}
	for _, tc := range []struct {
		name string
		sas  []SA
		want int
	}{
		{"one", []SA{sa(1, time.Hour)}, 0},
		{"two", []SA{sa(1, time.Hour), sa(2, time.Minute)}, 1},
		{"three", []SA{sa(1, time.Hour), sa(2, time.Minute), sa(3, time.Minute)}, 2},
		{"one just now", []SA{sa(1, time.Hour), sa(2, time.Second)}, 0},
		{"one at work", []SA{sa(1, time.Hour), sa(2, time.Minute, "IKE_REAUTH")}, 0},
		{"one without a child", []SA{sa(1, time.Hour), {ID: 2, State: Established, Age: time.Hour}}, 0},
		{"one connecting", []SA{sa(1, time.Hour), {ID: 2, State: "CONNECTING"}}, 0},
	} {
		if got := len(extra(a, tc.sas)); got != tc.want {
			t.Errorf("%s: ends %d, want %d", tc.name, got, tc.want)
		}
		if got := len(extra(b, tc.sas)); got != 0 {
			t.Errorf("%s: the other end ends %d too", tc.name, got)
		}
	}
}

// TestF142_TheOneInUseStays checks that the SA by which this end sends packets remains.
func TestF142_TheOneInUseStays(t *testing.T) {
	used, unused := []ChildSA{{IdleOut: time.Second}}, []ChildSA{{IdleOut: time.Minute}}
	for _, sas := range [][]SA{
		{{ID: 1, State: Established, Age: time.Minute, Children: used}, {ID: 2, State: Established, Age: time.Minute,
			Children: unused}},
		{{ID: 3, State: Established, Age: time.Minute, Children: unused}, {ID: 1, State: Established, Age: time.Minute,
			Children: used}},
	} {
		if got := extra(tunnel("h2", "192.0.2.2"), sas); len(got) != 1 || got[0].ID == 1 {
			t.Errorf("of %v %v goes", sas, got)
		}
	}
}

// TestJudge checks lines of strongSwan 5.9.8.
func TestJudge(t *testing.T) {
	for line, want := range map[string]string{
		"IKE_SA lariat-h2[1] established between 192.0.2.1[h1]...192.0.2.2[h2]": "up",
		"CHILD_SA overlay{2} established with SPIs c1 c2 and TS 10.0.0.0/8":     "up",
		"received AUTHENTICATION_FAILED notify error":                           "AUTHENTICATION_FAILED",
		"received NO_PROPOSAL_CHOSEN notify error":                              "NO_PROPOSAL_CHOSEN",
		"received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built":                 "NO_PROPOSAL_CHOSEN",
		"received TS_UNACCEPTABLE notify, no CHILD_SA built":                    "other subnets",
		"received INVALID_SYNTAX notify error":                                  "INVALID_SYNTAX",
		"giving up after 6 retransmits":                                         "no answer",
		"tried 1 shared key for 'h1' - 'h2', but MAC mismatched":                "does not match",
		"no shared key found for 'h1' - 'h2'":                                   "no shared key",
		"no trusted ECDSA public key found for 'h2'":                            "no trusted",
		"sending retransmit 1 of request message ID 0, seq 1":                   "",
		"initiating IKE_SA lariat-h2[1] to 192.0.2.2":                           "",
	} {
		wrong, up := judge(line)
		if up != (want == "up") || !up && (want == "") != (wrong == "") || !up && !strings.Contains(wrong, want) {
			t.Errorf("%s: %q, up %t; want %q", line, wrong, up, want)
		}
	}
}

// TestRecent checks that 5.9 is the oldest version.
func TestRecent(t *testing.T) {
	for v, want := range map[string]bool{"5.9.8": true, "5.9": true, "5.10.1": true, "6.0.1": true, "6.0dr4": true,
		"5.8.4": false, "4.6.1": false, "": false, "x.y": false, "5.9dr1": true} {
		if recent(v) != want {
			t.Errorf("%q: %t", v, !want)
		}
	}
}
