package kernel_test

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestF1_FirstPackets checks that the kernel loses no packet of a container after its ADD.
// The container sends as soon as its ADD has returned, on a busy machine.
// A device without a queue drops the host's first request for the container's MAC.
// The answer then waits for the second request, a second later. The kernel counts the requests.
//
// LARIAT_FIRST_PACKETS is the number of containers, one after the other.
// test/guest/kernel runs the test in other kernels.
func TestF1_FirstPackets(t *testing.T) {
	rounds, err := strconv.Atoi(cmp.Or(os.Getenv("LARIAT_FIRST_PACKETS"), "50"))
	if err != nil {
		t.Fatal(err)
	}
	host, inside := netnstest.New(t), netnstest.New(t)
	for _, addr := range []string{"192.0.2.1/32", "2001:db8::1/128"} {
		host.Command(t, "ip", "addr", "add", addr, "dev", "lo")
	}
	k := openKernel(t, host)
	busy(t, 2)
	ways := []*way{
		newWay(t, inside, "ip4:icmp", "10.42.0.5", "192.0.2.1"),
		newWay(t, inside, "ip6:ipv6-icmp", "fd42::5", "2001:db8::1"),
	}
	for round := range rounds {
		var addresses []metadata.AttachmentAddress
		for _, w := range ways {
			addresses = append(addresses, metadata.AttachmentAddress{Address: w.from})
		}
		id := metadata.AttachmentID{ContainerID: fmt.Sprint("c", round), IfName: "eth0"}
		p := attach.Plan(&metadata.Attachment{Network: "n", MTU: 1450, Addresses: addresses}, attach.Config{ID: id})
		if err := k.AddEndpoint(t.Context(), inside.Path(), p); err != nil {
			t.Fatal(err)
		}
		for i := range ways { // each family is the first in turn
			ways[(round+i)%len(ways)].ping(t, round)
		}
		host.Do(t, func() {
			have := requests(t, p.HostName)
			for _, w := range ways {
				// The kernel's count starts at the number of requests to a previously known MAC.
				family := map[bool]string{false: "ipv4", true: "ipv6"}[w.from.Is6()]
				text, err := os.ReadFile("/proc/sys/net/" + family + "/neigh/" + p.HostName + "/ucast_solicit")
				if err != nil {
					t.Fatal(err)
				}
				known, err := strconv.Atoi(strings.TrimSpace(string(text)))
				if err != nil {
					t.Fatal(err)
				}
				if got, ok := have[w.from]; !ok || got != known+1 {
					t.Errorf("container %d: the host asked %d times for the MAC of %s, want once", round, got-known, w.from)
				}
			}
		})
		if err := k.DelEndpoint(t.Context(), p.HostName); err != nil {
			t.Fatal(err)
		}
	}
}

// busy keeps n processors busy, so that the kernel's work queues run late.
func busy(t *testing.T, n int) {
	t.Helper()
	for range n {
		loop := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
		if err := loop.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = loop.Wait() })
	}
}

// A way leads from a container to its host, by one family.
// Its socket exists before the container's device.
type way struct {
	conn     *icmp.PacketConn
	from, to netip.Addr
}

func newWay(t *testing.T, inside *netnstest.NS, network, from, to string) *way {
	t.Helper()
	w := &way{from: netip.MustParseAddr(from), to: netip.MustParseAddr(to)}
	inside.Do(t, func() {
		var err error
		if w.conn, err = icmp.ListenPacket(network, ""); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { w.conn.Close() })
	return w
}

// ping sends one request with number seq and waits for the answer.
func (w *way) ping(t *testing.T, seq int) {
	t.Helper()
	echo, reply, proto := icmp.Type(ipv4.ICMPTypeEcho), icmp.Type(ipv4.ICMPTypeEchoReply), unix.IPPROTO_ICMP
	if w.to.Is6() {
		echo, reply, proto = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply, unix.IPPROTO_ICMPV6
	}
	packet, err := (&icmp.Message{Type: echo, Body: &icmp.Echo{ID: 1, Seq: seq}}).Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.conn.WriteTo(packet, &net.IPAddr{IP: w.to.AsSlice()}); err != nil {
		t.Fatalf("container %d: ping %s: %v", seq, w.to, err)
	}
	if err := w.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 1500); ; {
		n, _, err := w.conn.ReadFrom(buf)
		if err != nil {
			t.Fatalf("container %d: ping %s: %v", seq, w.to, err)
		}
		m, err := icmp.ParseMessage(proto, buf[:n])
		if err != nil || m.Type != reply {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.Seq == seq {
			return
		}
	}
}

// requests returns how often the kernel requested the MAC of each neighbour of a device.
func requests(t *testing.T, device string) map[netip.Addr]int {
	t.Helper()
	link, err := netlink.LinkByName(device)
	if err != nil {
		t.Fatal(err)
	}
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP)
	req.AddData(&netlink.Ndmsg{Index: uint32(link.Attrs().Index)})
	found, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if err != nil {
		t.Fatal(err)
	}
	out := map[netip.Addr]int{}
	for _, m := range found {
		attrs, err := nl.ParseRouteAttr(m[unix.SizeofNdMsg:])
		if err != nil {
			t.Fatal(err)
		}
		var addr netip.Addr
		probes := 0
		for _, a := range attrs {
			switch a.Attr.Type {
			case unix.NDA_DST:
				addr, _ = netip.AddrFromSlice(a.Value)
			case unix.NDA_PROBES:
				probes = int(nl.NativeEndian().Uint32(a.Value))
			}
		}
		if nl.NativeEndian().Uint32(m[4:]) == uint32(link.Attrs().Index) {
			out[addr] = probes
		}
	}
	return out
}
