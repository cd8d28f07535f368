package ike

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

// overlap is how long keys outlive the moment when new ones are asked for. strongSwan's default is a tenth of
// their life, which with a short one is less than an exchange takes on a slow host, or one retransmission:
// packets would be dropped until its end. A minute is an exchange that is given up (20 s: see the
// retransmissions in strongswan.conf), and another one.
func overlap(rekey time.Duration) time.Duration { return max(rekey/10, time.Minute) }

// renewal is when an end asks for new keys, what is taken off that by chance so that not all are renewed at once, and
// when the old keys end.
//
// One end leads. Where both ask at the same time, strongSwan before 6.0 may leave an end without the SA by which
// it should send (its issue 1896), or sending by one that the other end drops; the slower the exchange, the
// likelier it is. The other end asks when the leader has not, in the middle of the overlap.
func renewal(rekey time.Duration, leads bool) (ask, chance, end time.Duration) {
	rest := overlap(rekey)
	if leads {
		return rekey, rekey / 10, rekey + rest
	}
	return rekey + rest*2/3, rest / 3, rekey + rest
}

// leads reports whether this end of a tunnel does what both ends must not do at once.
func leads(t ipsec.Tunnel) bool { return t.LocalID < t.RemoteID }

// connection is what load-conn is given for a tunnel.
func connection(t ipsec.Tunnel, c Credentials) section {
	local := section{{"auth", t.Auth}, {"id", t.LocalID}}
	remote := section{{"auth", t.Auth}, {"id", t.RemoteID}}
	if t.Auth == ipsec.AuthPubkey {
		// Named here, and not loaded for everybody, so that the system's own connections neither use nor trust them.
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
		{"mobike", "no"}, // a host's address is what the metadata says
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
		// The trap alone sets tunnels up: the next packet tries again. Together with a restart on DPD or close
		// there would be two of everything; strongSwan #541.
		{"start_action", "trap"},
		{"dpd_action", "clear"},
		{"close_action", "none"},
	}
}

// key is a pair's key as it is to be loaded.
type key struct {
	id     string // of the daemon's, unique among all of its keys
	secret string // id of the secret it derives from
	digest [sha256.Size]byte
	args   section
}

// keys are a tunnel's, the one to send first.
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
			// The peer alone is the owner. To verify a peer the daemon tries each key of which one owner matches,
			// whichever: were this host an owner too, every peer's key would do for every other peer's name.
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

// moved reports whether a tunnel goes somewhere else, or to somebody else, so that what is established is of no use.
func moved(a, b ipsec.Tunnel) bool {
	type end struct {
		local, remote     netip.Addr
		localID, remoteID string
		auth              string
	}
	return end{a.Local, a.Remote, a.LocalID, a.RemoteID, a.Auth} != end{b.Local, b.Remote, b.LocalID, b.RemoteID, b.Auth}
}
