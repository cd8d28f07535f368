package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
)

// encrypted lists the networks whose packets travel in ESP.
func encrypted(s *metadata.Snapshot) (out []string) {
	for _, n := range s.Networks {
		if n.Encapsulation == metadata.EncapIPsec {
			out = append(out, n.Name)
		}
	}
	return out
}

// Needed reports whether the model needs the feature. Without a model, every feature is needed
// except those of encrypted networks, which are rare.
func (f Feature) Needed(s *metadata.Snapshot) bool {
	if s == nil {
		return f.Encap != metadata.EncapIPsec
	}
	v6, uses := false, false
	for _, n := range s.Networks {
		uses = uses || n.Encapsulation == f.Encap
		for _, p := range n.Subnets {
			v6 = v6 || n.Encapsulation != metadata.EncapNone && p.Addr().Is6()
		}
	}
	if f.IPv6 && !v6 {
		return false
	}
	switch f.Encap {
	case metadata.EncapIPsec:
		me, ok := s.Host(s.Self)
		outer := map[bool]int{false: 4, true: 6}[me.UnderlayAddr().Is6()]
		return uses && (f.Outer == 0 || !ok || f.Outer == outer)
	case metadata.EncapVXLAN:
		return uses || len(encrypted(s)) == 0 // without any network: VXLAN is the usual first one
	}
	return true
}

// inner returns the longest packet of an encrypted network that fits an underlay packet of so many
// bytes. It holds for every suite that two hosts may agree on.
func inner(underlay int, v6 bool) int { return mtu.ESP(underlay, 16, 16, v6, true) }

// outer returns the maximum length of the network's packets in their tunnels on host h.
func outer(n metadata.Network, h metadata.Host) int {
	size := mtu.Container(n, h)
	if n.Encapsulation != metadata.EncapIPsec {
		return size + mtu.Overhead(n, h)
	}
	out := size
	for inner(out, h.UnderlayAddr().Is6()) < size {
		out++
	}
	return out
}

// tunnelFacts asks the network manager for the state of the tunnels.
func (g Gatherer) tunnelFacts(ctx context.Context, f *Facts) {
	var r ipsec.Report
	var bad error
	status, err := getUnix(ctx, g.ManagerSocket, "/v1/tunnels", func(b []byte) error {
		bad = json.Unmarshal(b, &r) // with another status the body is no JSON
		return nil
	})
	switch {
	case err != nil:
		f.Unavailable["tunnels"] = fmt.Sprintf("the network manager did not tell of its tunnels: %v", err)
	case status == http.StatusNotFound:
		f.Unavailable["tunnels"] = "the network manager is older than this program: update and restart it"
	case status != http.StatusOK || bad != nil:
		f.Unavailable["tunnels"] = fmt.Sprintf("the network manager did not tell of its tunnels: status %d", status)
	default:
		f.Manager.Tunnels = &r
	}
}

func (g Gatherer) secretFacts(f *Facts) {
	path := cmp.Or(g.SecretFile, ipsec.DefaultSecretFile)
	switch info, err := os.Stat(path); {
	case err == nil:
		f.Secret = &SecretFile{Path: path, There: true, Mode: info.Mode()}
	case errors.Is(err, fs.ErrNotExist):
		f.Secret = &SecretFile{Path: path}
	default:
		f.Unavailable["secret"] = fmt.Sprintf("secret file: %v", err)
	}
}

// switches lists the sysctls of every device that let packets bypass IPsec's policies.
func switches() (out []string) {
	for _, pattern := range []string{"ipv4/conf/*/disable_xfrm", "ipv4/conf/*/disable_policy",
		"ipv6/conf/*/disable_policy"} {
		found, _ := filepath.Glob("/proc/sys/net/" + pattern) // the pattern is valid
		for _, file := range found {
			out = append(out, strings.TrimPrefix(file, "/proc/sys/"))
		}
	}
	return out
}

// chains compares the nftables chains with their desired state.
func chains(want, have *delta.State) (out []Device) {
	text := func(s *delta.State, name string) string {
		c, ok := s.Chains[name]
		if !ok {
			return ""
		}
		only := delta.NewState()
		only.Chains[name] = c
		return strings.TrimSpace(only.String())
	}
	for _, name := range slices.Sorted(maps.Keys(want.Chains)) {
		out = append(out, Device{Name: name, Want: text(want, name), Have: text(have, name)})
	}
	return out
}

const tunnelPorts = "open UDP 500 and 4500 and ESP (IP protocol 50) between the hosts in every firewall on the " +
	"way and on both ends, and look whether lariat-network-manager runs there"

// cures maps words of errors from pkg/ike, or from strongSwan behind it, to the remedy for a tunnel
// that is not set up.
var cures = []struct {
	words  []string
	remedy string
}{
	{[]string{"authentication", "auth_failed", "shared key", "trusted", "private key", "certificate", "signature",
		"constraint"},
		"the hosts have different secrets, or certificates of different authorities: compare the KEYS that lariat ipsec " +
			"status shows on both; lariat ipsec rotate brings the same secret to both"},
	{[]string{"ts_unacceptable", "selectors", "child_sa config"},
		"compare lariat network list on both: one of them does not hear of changes; systemctl status lariat-metadata " +
			"lariat-network-manager there"},
	{[]string{"no_proposal", "no acceptable", "proposal", "invalid_ke", "ike config", "peer config"},
		"compare the SUITES that lariat ipsec status shows on both: the kernel of one lacks AES-GCM, or the IKE daemon " +
			"of one lacks a plugin; lariat doctor features, on both, tells of the kernel. " +
			"A host that has just joined is known after a moment; when not: systemctl status lariat-metadata " +
			"lariat-network-manager there"},
	{[]string{"answer", "timeout", "timed out", "time out", "respon", "retransmi", "unreachable"}, tunnelPorts},
}

// rules reports missing or changed rules that keep containers, networks and the underlay apart.
func (e *checkContext) rules() {
	if !e.needs("kernel", e.Kernel != nil) {
		return
	}
	if why := e.Unavailable["devices"]; why != "" {
		e.skip("%s", why)
	}
	var missing, changed []string
	for _, c := range e.Kernel.Chains {
		switch {
		case c.Have == "":
			missing = append(missing, c.Name)
		case c.Have != c.Want:
			changed = append(changed, c.Name)
		}
	}
	const remedy = "start lariat-network-manager, which puts them back; until then containers are not kept apart, " +
		"and those of encrypted networks may be heard in clear: stop them if that matters. " +
		"Look for what removes the rules: another program's nft flush ruleset"
	table := "nftables table inet " + delta.Table
	if len(missing) > 0 {
		e.add(Error, table, remedy, "rules that keep containers, networks and the underlay apart are missing: chain %s",
			strings.Join(missing, ", "))
	}
	if len(changed) > 0 {
		e.add(Error, table, remedy, "rules that keep containers, networks and the underlay apart are not as they should "+
			"be: chain %s", strings.Join(changed, ", "))
	}
}

// ipsec reports the causes of tunnels that are not set up.
func (e *checkContext) ipsec() {
	if !e.needsSnapshot() || len(encrypted(e.Metadata.Snapshot)) == 0 || !e.needs("manager", e.Manager != nil) {
		return
	}
	if e.Manager.Err != nil {
		e.skip("the network manager, who keeps the tunnels, did not answer")
		return
	}
	if !e.needs("tunnels", e.Manager.Tunnels != nil) {
		return
	}
	r, where := e.Manager.Tunnels, "host "+e.Self
	remedy := cmp.Or(r.Remedy, "look at journalctl -u lariat-network-manager")
	switch {
	case r.Missing != "":
		e.add(Error, where, remedy, "this host cannot encrypt: %s", strings.ReplaceAll(r.Missing, "\n", "; "))
		return
	case r.Problem != "":
		e.add(Error, where, remedy, "this host's tunnels are not kept: %s", strings.ReplaceAll(r.Problem, "\n", "; "))
		return
	}
	type trouble struct {
		severity Severity
		cure     int // -1: no remedy is known
	}
	found := map[trouble][]Peer{}
	words := map[string]string{}
	var unknown []Peer
	for _, t := range r.Tunnels {
		if h, ok := e.Metadata.Snapshot.Host(t.Peer); !ok || !h.Live {
			continue // already reported
		}
		p := Peer{Host: t.Peer, Addr: t.Remote}
		switch {
		case t.LastError != "":
			severity := Error
			if t.State == ipsec.StateEstablished {
				severity = Warning
			}
			words[t.Peer] = t.LastError
			lower := strings.ToLower(t.LastError)
			k := trouble{severity, -1}
			for i, c := range cures {
				if slices.ContainsFunc(c.words, func(w string) bool { return strings.Contains(lower, w) }) {
					k.cure = i
					break
				}
			}
			found[k] = append(found[k], p)
		case t.State == ipsec.StateDown:
			unknown = append(unknown, p)
		}
	}
	for _, severity := range []Severity{Error, Warning} {
		for i := -1; i < len(cures); i++ {
			list := found[trouble{severity, i}]
			if len(list) == 0 {
				continue
			}
			remedy := "look at journalctl -u lariat-network-manager on both hosts"
			if i >= 0 {
				remedy = cures[i].remedy
			}
			one, many := "no tunnel to host %s: ", "no tunnels to %d hosts: "
			if severity == Warning {
				one, many = "trouble with the tunnel to host %s, which stands: ",
					"trouble with the tunnels to %d hosts, which stand: "
			}
			e.each(list, severity, remedy, func(p Peer) string {
				return fmt.Sprintf(one, p.Host) + words[p.Host]
			}, many+strings.ReplaceAll(words[list[0].Host], "%", "%%"))
		}
	}
	e.each(unknown, Error, "look at journalctl -u lariat-network-manager", func(p Peer) string {
		return fmt.Sprintf("the IKE daemon does not know of a tunnel to host %s", p.Host)
	}, "the IKE daemon does not know of tunnels to %d hosts")
}

// toldOfTunnel reports whether a finding of this check-up already explains why no packet passes the
// tunnel to a host.
func (e *checkContext) toldOfTunnel(host string) bool {
	return slices.ContainsFunc(e.report.Findings, func(f Finding) bool {
		return f.Check == "ipsec" && f.Severity == Error &&
			(f.Where == "host "+e.Self || strings.HasPrefix(f.Where, "hosts ") &&
				slices.Contains(strings.Split(f.Where[6:], ", "), host) ||
				strings.HasPrefix(f.Where, "host "+host+" "))
	})
}

// secret compares the secrets that the hosts have announced, and checks the mode of the file.
func (e *checkContext) secret() {
	if !e.needsSnapshot() {
		return
	}
	s := e.Metadata.Snapshot
	used := len(encrypted(s)) > 0
	if e.Secret == nil && used {
		e.needs("secret", false)
	}
	if f := e.Secret; f != nil && f.There && f.Mode.Perm()&0o077 != 0 {
		e.add(Error, f.Path, "chmod 600 "+f.Path+"; if somebody did read it, make a new one and lariat ipsec rotate on "+
			"every host", "others can read the secret of encrypted networks (mode %04o)", f.Mode.Perm())
	}
	if !used {
		return
	}
	me, _ := s.Host(e.Self)
	mine := me.IKEKeys
	if e.Manager != nil && e.Manager.Tunnels != nil {
		r := e.Manager.Tunnels
		if r.Auth == ipsec.AuthPubkey || r.Missing != "" {
			return // there is no secret, or the other check reports the reason
		}
		if len(r.Keys) > 0 {
			mine = r.Keys
		}
	}
	if len(mine) == 0 {
		e.skip("this host has not announced a secret")
		return
	}
	var none, other, late []Peer
	for _, h := range s.Hosts {
		p := Peer{Host: h.Name, Addr: h.UnderlayAddr()}
		common := slices.ContainsFunc(h.IKEKeys, func(k string) bool { return slices.Contains(mine, k) })
		switch {
		case h.Name == e.Self || !h.Live:
		case len(h.IKEKeys) == 0:
			none = append(none, p)
		case !common:
			other = append(other, p)
		case h.IKEKeys[0] != mine[0]:
			late = append(late, p)
		}
	}
	e.each(none, Error, "there: lariat ipsec status tells why; bring it the secret that the other hosts have ("+
		ipsec.DefaultSecretFile+")", func(p Peer) string {
		return fmt.Sprintf("host %s has loaded no secret: no tunnel to it can be set up", p.Host)
	}, "%d hosts have loaded no secret: no tunnel to them can be set up")
	e.each(other, Error, "one of the two has the wrong secret: compare the KEYS that lariat ipsec status shows on "+
		"both, and lariat ipsec rotate on the one that is wrong", func(p Peer) string {
		return fmt.Sprintf("host %s shares no secret with this one, which has %s: no tunnel to it can be set up", p.Host,
			strings.Join(mine, ", "))
	}, "%d hosts share no secret with this one: no tunnel to them can be set up")
	e.each(late, Warning, "bring the newest secret to every host: lariat ipsec rotate NEWFILE; when lariat ipsec "+
		"rotate shows that all have it: lariat ipsec rotate --finish, on every host", func(p Peer) string {
		return fmt.Sprintf("a rotation of the secret is unfinished: host %s does not use %s first, as this host does", p.Host,
			mine[0])
	}, "a rotation of the secret is unfinished: %d hosts do not use "+mine[0]+" first, as this host does")
}

// failClosed reports sysctls that would let packets of encrypted networks travel in clear.
func (e *checkContext) failClosed() {
	if !e.needsSnapshot() || len(encrypted(e.Metadata.Snapshot)) == 0 || !e.needs("kernel", e.Kernel != nil) {
		return
	}
	k := e.Kernel
	if why := e.Unavailable["devices"]; why != "" {
		e.skip("%s", why)
	}
	devices := map[string]bool{"all": true} // not lo, where they are always set
	for _, d := range k.Devices {
		devices[d.Name] = true
	}
	if me, ok := e.Metadata.Snapshot.Host(e.Self); ok {
		for _, u := range me.Underlay {
			for name, l := range k.Links {
				if name != "lo" && (name == u.Device ||
					slices.ContainsFunc(l.Addrs, func(p netip.Prefix) bool { return p.Addr() == u.Address.Addr() })) {
					devices[name] = true
				}
			}
		}
	}
	var keys []string
	for key, value := range k.Sysctls {
		dir, name := filepath.Split(key)
		if (name == "disable_xfrm" || name == "disable_policy") && value != "0" && value != "" &&
			devices[filepath.Base(dir)] {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		e.add(Error, "sysctl "+key, fmt.Sprintf("sysctl -w %s=0, and look in /etc/sysctl.d for what sets it", key),
			"the kernel does not ask IPsec's policies on %s: %s is set", filepath.Base(filepath.Dir(key)), filepath.Base(key))
	}
}
