package bench_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
	"github.com/lariat-net/lariat/pkg/plan"
)

// path is two hosts of their own, with a container each, and a way from one container to the other.
//
//	10.42.1.5 ── host 1 ── 192.0.2.1 ═══ 192.0.2.2 ── host 2 ── 10.42.2.5
type path struct {
	name       string
	encrypted  bool
	hosts      [2]*netnstest.NS
	containers [2]*netnstest.NS
	devices    [2]string // of the underlay
	listener   int       // in the second container
}

func newPath(b *testing.B, name string) *path {
	b.Helper()
	p := &path{name: name, listener: -1}
	for i := range p.hosts {
		p.hosts[i], p.containers[i] = netnstest.New(b), netnstest.New(b)
	}
	p.devices[0], p.devices[1] = netnstest.Veth(b, p.hosts[0], "192.0.2.1/24", p.hosts[1], "192.0.2.2/24")
	return p
}

func container(i int) string { return fmt.Sprintf("10.42.%d.5", i+1) }

// ready waits until the containers reach each other, which sets a tunnel up, and listens in the second.
func (p *path) ready(b *testing.B) {
	b.Helper()
	eventually(b, p.name+": an answer", wait, func() bool {
		var err error
		p.containers[0].Do(b, func() { err = exec.Command("ping", "-c", "1", "-W", "1", container(1)).Run() })
		return err == nil
	})
	p.listen(b)
}

// esp is how many octets the security associations of the sending host have been used for.
func (p *path) esp(b *testing.B) (octets int64) {
	b.Helper()
	if !p.encrypted {
		return 0
	}
	for _, word := range strings.Fields(p.hosts[0].Command(b, "ip", "-s", "xfrm", "state")) {
		if n, ok := strings.CutSuffix(word, "(bytes),"); ok {
			v, _ := strconv.ParseInt(n, 10, 64)
			octets += v
		}
	}
	return octets
}

const network = "private"

// secret is nobody's.
var secret = base64.StdEncoding.EncodeToString([]byte("a secret of a benchmark, and of nobody"))

// cluster is the metadata of two hosts with an encrypted network.
func (p *path) cluster(hostNAT bool) *metadata.Snapshot {
	s := &metadata.Snapshot{Networks: []metadata.Network{{Name: network, Encapsulation: metadata.EncapIPsec,
		HostNAT: hostNAT,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}}}}
	for i := range p.hosts {
		name := fmt.Sprint("h", i+1)
		s.Hosts = append(s.Hosts, metadata.Host{Name: name, Underlay: []metadata.Underlay{
			{Address: netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i+1)), Device: p.devices[i], MTU: 1500}}})
		s.Blocks = append(s.Blocks, metadata.Block{Network: network, Host: name,
			CIDR:    netip.MustParsePrefix(fmt.Sprintf("10.42.%d.0/26", i+1)),
			Gateway: netip.MustParseAddr(fmt.Sprintf("10.42.%d.1", i+1))})
	}
	return s
}

// newLariat has what Lariat plans: all of it, made by what makes it on a real host.
func newLariat(b *testing.B, name string, hostNAT bool) *path {
	b.Helper()
	p := newPath(b, name)
	p.encrypted = true
	snap := p.cluster(hostNAT)
	secrets, err := ipsec.ParseSecrets([]byte(secret))
	must(b, err)
	for i, h := range snap.Hosts {
		k, err := kernel.NewAt(p.hosts[i].Path())
		must(b, err)
		b.Cleanup(func() { k.Close() })
		want := plan.Desired(snap, h.Name, false)
		if len(want.Problems) > 0 {
			b.Fatal(want.Problems)
		}
		_, err = kernel.Reconcile(b.Context(), k, want)
		must(b, err)

		d := &ike.Daemon{Socket: charon(b, p.hosts[i]).Socket()}
		b.Cleanup(func() { _ = d.Close() })
		_, err = d.Apply(b.Context(), ipsec.Tunnels(snap, h.Name, ipsec.Options{Keys: secrets.IDs()}),
			ike.Credentials{Secrets: secrets}, false)
		must(b, err)

		a := &metadata.Attachment{Network: network, Encapsulation: metadata.EncapIPsec,
			MTU: mtu.Container(snap.Networks[0], h), Subnets: snap.Networks[0].Subnets, Host: h.Name,
			Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr(container(i)),
				Gateway: snap.Blocks[i].Gateway}}}
		must(b, k.AddEndpoint(b.Context(), p.containers[i].Path(),
			attach.Plan(a, attach.Config{ID: metadata.AttachmentID{ContainerID: h.Name, IfName: "eth0"}})))
	}
	return p
}

// charon runs in a namespace until the benchmark ends. By hand or not: it is the same program with the same settings.
func charon(b *testing.B, ns *netnstest.NS) *ike.Charon {
	b.Helper()
	dir, err := os.MkdirTemp("", "ike-") // short: a socket is in it
	must(b, err)
	c := &ike.Charon{Dir: dir}
	b.Cleanup(func() {
		if err := c.Stop(context.Background()); err != nil {
			b.Error(err)
		}
		os.RemoveAll(dir)
	})
	ns.Do(b, func() { must(b, c.Ensure(b.Context())) })
	return c
}

// byHand is what an administrator would type on each host, for a way of this kind: $i is this host, $j the
// other, $dev the underlay's device.
type byHand struct {
	mtu    int
	script string
	conf   string // swanctl.conf, if there is one; of the same variables
}

var (
	plainByHand = byHand{mtu: 1500, script: `ip route add 10.42.$j.0/26 via 192.0.2.$j`}

	vxlanByHand = byHand{mtu: 1450, script: `
ip link add vtep1042 address 0e:00:c0:00:02:0$i type vxlan id 1042 dstport 4789 local 192.0.2.$i nolearning
ip link set vtep1042 mtu 1450 up
ip neighbour add 192.0.2.$j lladdr 0e:00:c0:00:02:0$j dev vtep1042 nud permanent
bridge fdb append 0e:00:c0:00:02:0$j dev vtep1042 dst 192.0.2.$j self permanent
ip nexthop add id 100$j via 192.0.2.$j dev vtep1042 onlink
ip route add 10.42.$j.0/26 nhid 100$j
`}

	ipsecByHand = byHand{mtu: 1422, script: `
ip link add ipsec0 type xfrm dev $dev if_id 66
ip link set ipsec0 mtu 1422 up
ip route add 10.42.$j.0/26 dev ipsec0
`, conf: `
connections {
  h$j {
    version = 2
    local_addrs = 192.0.2.$i
    remote_addrs = 192.0.2.$j
    proposals = aes256gcm16-prfsha256-x25519
    mobike = no
    local {
      auth = psk
      id = h$i
    }
    remote {
      auth = psk
      id = h$j
    }
    children {
      overlay {
        local_ts = 10.42.0.0/16
        remote_ts = 10.42.0.0/16
        esp_proposals = aes256gcm16-x25519-esn
        if_id_in = 66
        if_id_out = 66
        replay_window = 1024
        start_action = trap
      }
    }
  }
}
secrets {
  ike-h$j {
    id = h$j
    secret = "$secret"
  }
}
`}
)

// rulesByHand keep clear packets off the wire and let none in, and no more, for the reader: what that costs
// whoever does it.
const rulesByHand = `
ip link set dev port0 group 76
ip link set dev ipsec0 group 76
nft -f - <<.
table inet guard {
	chain in {
		type filter hook prerouting priority -300;
		ip saddr 10.42.0.0/16 iifgroup != 76 iifname != "lo" drop
	}
	chain out {
		type filter hook postrouting priority -300;
		ip daddr 10.42.0.0/16 oifgroup != 76 rt ipsec missing oifname != "lo" drop
	}
}
.
`

// The container's part is like Lariat's: a routed veth pair with a permanent neighbour, and the strict
// reverse-path check on it.
const (
	portByHand = `
echo 1 >/proc/sys/net/ipv4/ip_forward
ip link add port0 address 0e:fe:00:00:00:01 mtu $mtu type veth peer name eth0 mtu $mtu netns $container
echo 1 >/proc/sys/net/ipv4/conf/port0/rp_filter
ip link set port0 up
ip route add 10.42.$i.5/32 dev port0
`
	containerByHand = `
ip address add 10.42.$i.5/32 dev eth0
ip link set eth0 up
ip neighbour add 10.42.$i.1 lladdr 0e:fe:00:00:00:01 dev eth0 nud permanent
ip route add 10.42.$i.1 dev eth0 scope link
ip route add default via 10.42.$i.1 dev eth0
`
)

func newByHand(b *testing.B, name string, way byHand, more string) *path {
	b.Helper()
	p := newPath(b, name)
	p.encrypted = way.conf != ""
	for i, host := range p.hosts {
		fill := strings.NewReplacer("$i", fmt.Sprint(i+1), "$j", fmt.Sprint(2-i), "$dev", p.devices[i], "$mtu",
			fmt.Sprint(way.mtu),
			"$container", p.containers[i].Path(), "$secret", secret).Replace
		host.Command(b, "sh", "-ec", fill(portByHand+way.script+more))
		p.containers[i].Command(b, "sh", "-ec", fill(containerByHand))
		if p.encrypted {
			c := charon(b, host)
			conf := filepath.Join(filepath.Dir(c.Socket()), "swanctl.conf")
			must(b, os.WriteFile(conf, []byte(fill(way.conf)), 0o600))
			host.Command(b, "swanctl", "--load-all", "--file", conf, "--uri", "unix://"+c.Socket())
		}
	}
	return p
}
