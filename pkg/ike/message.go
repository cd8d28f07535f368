package ike

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

// overlap returns the lifetime of old keys after the request for new keys.
// strongSwan's default is a tenth of the keys' lifetime.
// For a short lifetime this is less than an exchange on a slow host, or than one retransmission.
// The kernel would drop packets until the end of that exchange.
// A minute is enough for one failed exchange (20 s: see the retransmissions in strongswan.conf) and
// another one.
func overlap(rekey time.Duration) time.Duration { return max(rekey/10, time.Minute) }

// renewal returns the age of keys at which an end requests new keys.
// end is the age at which old keys end.
// chance is the maximal random reduction of ask, so that not all keys are renewed at once.
//
// One end leads, because simultaneous requests fail in strongSwan before 6.0.
// An end may then lack the SA for its packets (strongSwan's issue 1896).
// Or an end sends by an SA that the other end drops. A slow exchange makes both likelier.
// The other end requests new keys in the middle of the overlap, if the leader has not.
func renewal(rekey time.Duration, leads bool) (ask, chance, end time.Duration) {
	rest := overlap(rekey)
	if leads {
		return rekey, rekey / 10, rekey + rest
	}
	return rekey + rest*2/3, rest / 3, rekey + rest
}

// leads reports whether this end of a tunnel takes the actions that only one end may take.
func leads(t ipsec.Tunnel) bool { return t.LocalID < t.RemoteID }

// connection returns the arguments of load-conn for a tunnel.
func connection(t ipsec.Tunnel, c Credentials) section {
	local := section{{"auth", t.Auth}, {"id", t.LocalID}}
	remote := section{{"auth", t.Auth}, {"id", t.RemoteID}}
	if t.Auth == ipsec.AuthPubkey {
		// Name the certificates here and do not load them globally.
		// Therefore the system's own connections neither use nor trust them.
		local = append(local, field{"certs", ders(c.Certificate[:min(1, len(c.Certificate))])})
		remote = append(remote, field{"cacerts", ders(c.CAs)})
	}
	children := section{}
	for _, child := range t.Children {
		children = append(children, field{child.Network, childSection(child, leads(t))})
	}
	ask, chance, end := renewal(t.Rekey, leads(t))
	return section{{t.Name, section{
		{"version", "2"},
		{"local_addrs", []string{t.Local.String()}},
		{"remote_addrs", []string{t.Remote.String()}},
		{"proposals", t.Proposals},
		{"encap", yes(t.Encap)},
		{"mobike", "no"}, // the metadata defines a host's address
		{"unique", "replace"},
		{"dpd_delay", seconds(t.DPD)},
		{"rekey_time", seconds(ask)},
		{"rand_time", seconds(chance)},
		{"over_time", seconds(end - ask)},
		{"reauth_time", "0"},
		{"local", local},
		{"remote", remote},
		{"children", children},
	}}}
}

func childSection(c ipsec.Child, leads bool) section {
	ask, chance, end := renewal(c.Rekey, leads)
	ts := make([]string, len(c.Subnets))
	for i, p := range c.Subnets {
		ts[i] = p.String()
	}
	id := strconv.FormatUint(uint64(c.IfID), 10)
	return section{
		{"mode", "tunnel"},
		{"local_ts", ts},
		{"remote_ts", ts},
		{"esp_proposals", c.Proposals},
		{"if_id_in", id},
		{"if_id_out", id},
		{"rekey_time", seconds(ask)},
		{"rand_time", seconds(chance)},
		{"life_time", seconds(end)},
		{"replay_window", strconv.Itoa(ipsec.ReplayWindow)},
		// The trap alone sets tunnels up: the next packet retries.
		// An additional restart on DPD or close would duplicate all SAs (strongSwan #541).
		{"start_action", "trap"},
		{"dpd_action", "clear"},
		{"close_action", "none"},
	}
}

// A key is a pair's key with its arguments of load-shared.
type key struct {
	id     string // the daemon's id, unique among all its keys
	secret string // id of the secret from which the key derives
	digest [sha256.Size]byte
	args   section
}

// keys returns a tunnel's keys. The key to send comes first.
func keys(t ipsec.Tunnel, c Credentials) ([]key, error) {
	if t.Auth != ipsec.AuthPSK {
		return nil, nil
	}
	out := make([]key, 0, len(t.Keys))
	for _, id := range t.Keys {
		data := c.Secrets.Pair(id, t.LocalID, t.RemoteID)
		if data == nil {
			return nil, fmt.Errorf("%s: there is no secret %s; was the file of secrets changed meanwhile?", t.Name, id)
		}
		k := key{id: t.Name + "-" + id, secret: id}
		k.args = section{
			{"id", k.id},
			{"type", "ike"},
			{"data", secret(data)},
			// The peer is the only owner.
			// To verify a peer, the daemon tries each key with a matching owner.
			// If this host were an owner too, every peer's key would prove every other peer's name.
			{"owners", []string{t.RemoteID}},
		}
		k.digest = sha256.Sum256(fmt.Appendf(data, "%q", t.RemoteID))
		out = append(out, k)
	}
	return out, nil
}

func ders(list [][]byte) []der {
	out := make([]der, len(list))
	for i, x := range list {
		out[i] = x
	}
	return out
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// seconds rounds up: 0 means never to the daemon.
func seconds(d time.Duration) string {
	return strconv.FormatInt(int64((d+time.Second-1)/time.Second), 10)
}

// moved reports whether a tunnel has another address or identity, so that its SAs are useless.
func moved(a, b ipsec.Tunnel) bool {
	type end struct {
		local, remote     netip.Addr
		localID, remoteID string
		auth              string
	}
	return end{a.Local, a.Remote, a.LocalID, a.RemoteID, a.Auth} != end{b.Local, b.Remote, b.LocalID, b.RemoteID, b.Auth}
}
