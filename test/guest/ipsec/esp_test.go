// Package ipsec_test tries IPsec in a guest: the kernel's part of it by hand.
package ipsec_test

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/guest"
)

func TestMain(m *testing.M) { guest.Main(m, guest.Options{Warm: true}) }

// TestGuestHasEverything: whatever a program of this project asks of a kernel, this one has it.
func TestGuestHasEverything(t *testing.T) {
	for _, f := range probe.All() {
		if err := probe.Check(f); err != nil {
			t.Error(err)
		}
	}
}

// TestESPByHand: between two hosts with an XFRM interface each, what is routed to the interface is answered,
// and on the wire is nothing but ESP.
//
//	a  ipsec0 10.1.0.1 ── veth 192.0.2.1 ═══ ESP ═══ 192.0.2.2 veth ── ipsec0 10.2.0.1  b
func TestESPByHand(t *testing.T) {
	probe.Need(t, probe.ESP, probe.AESGCM, probe.XfrmInterface, probe.Veth)
	a, b := netnstest.New(t), netnstest.New(t)
	devA, devB := netnstest.Veth(t, a, "192.0.2.1/24", b, "192.0.2.2/24")
	side(t, a, devA, "192.0.2.1", "192.0.2.2", "10.1.0.1/24", "10.2.0.0/24")
	side(t, b, devB, "192.0.2.2", "192.0.2.1", "10.2.0.1/24", "10.1.0.0/24")

	wire := capture(t, b, devB)
	t.Log(a.Command(t, "ping", "-c", "3", "-i", "0.2", "-W", "5", "10.2.0.1"))
	esp, other := 0, 0
	for _, p := range wire() {
		switch {
		case len(p) < 34 || p[12] != 8 || p[13] != 0: // not IPv4: neighbours ask for each other
		case p[23] == unix.IPPROTO_ESP:
			esp++
		default:
			other++
			t.Errorf("not ESP on the wire: % x", p[:34])
		}
	}
	if esp < 6 {
		t.Errorf("%d packets of ESP on the wire, want those of three pings and their answers", esp)
	}
}

const (
	ifID  = 42
	reqID = 1
)

// side makes one end of the tunnel.
func side(t *testing.T, ns *netnstest.NS, dev, local, remote, inner, peers string) {
	t.Helper()
	ns.Do(t, func() {
		l, err := netlink.LinkByName(dev)
		must(t, err)
		any4 := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		for _, way := range []struct {
			src, dst string
			spi      int
			dirs     []netlink.Dir
		}{
			{local, remote, spi(local), []netlink.Dir{netlink.XFRM_DIR_OUT}},
			{remote, local, spi(remote), []netlink.Dir{netlink.XFRM_DIR_IN, netlink.XFRM_DIR_FWD}},
		} {
			src, dst := net.ParseIP(way.src), net.ParseIP(way.dst)
			must(t, netlink.XfrmStateAdd(&netlink.XfrmState{Src: src, Dst: dst, Proto: netlink.XFRM_PROTO_ESP,
				Mode: netlink.XFRM_MODE_TUNNEL, Spi: way.spi, Reqid: reqID, Ifid: ifID,
				ReplayWindow: 32, Aead: &netlink.XfrmStateAlgo{Name: "rfc4106(gcm(aes))", Key: bytes.Repeat([]byte{0x5a}, 20),
					ICVLen: 128}}))
			for _, dir := range way.dirs {
				must(t, netlink.XfrmPolicyAdd(&netlink.XfrmPolicy{Src: any4, Dst: any4, Dir: dir, Ifid: ifID,
					Tmpls: []netlink.XfrmPolicyTmpl{{Src: src, Dst: dst, Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL,
						Reqid: reqID}}}))
			}
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex, attrs.MTU = "ipsec0", l.Attrs().Index, 1400
		must(t, netlink.LinkAdd(&netlink.Xfrmi{LinkAttrs: attrs, Ifid: ifID}))
	})
	ns.Up(t, "ipsec0", inner)
	ns.Do(t, func() {
		l, err := netlink.LinkByName("ipsec0")
		must(t, err)
		_, to, err := net.ParseCIDR(peers)
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{Dst: to, LinkIndex: l.Attrs().Index}))
	})
}

// spi of what an address sends.
func spi(addr string) int { return 0x1000 + int(netip.MustParseAddr(addr).As4()[3]) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// capture collects the frames on a device until the returned function is called, which waits for no more than
// what has come. They are left in the guest's files as well, for tcpdump.
func capture(t *testing.T, ns *netnstest.NS, dev string) (stop func() [][]byte) {
	t.Helper()
	fd := -1
	ns.Do(t, func() {
		l, err := netlink.LinkByName(dev)
		must(t, err)
		all := uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK, int(all))
		must(t, err)
		must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index}))
	})
	return func() (frames [][]byte) {
		defer unix.Close(fd)
		var pcap bytes.Buffer
		// The header of a pcap file: magic, version 2.4, zone, accuracy, length, Ethernet.
		pcap.Write([]byte{0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 1, 0, 0, 0})
		for buf := make([]byte, 1<<16); ; {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				break // it would block: that was all
			}
			frames = append(frames, bytes.Clone(buf[:n]))
			pcap.Write([]byte{0, 0, 0, 0, 0, 0, 0, 0, byte(n), byte(n >> 8), 0, 0, byte(n), byte(n >> 8), 0, 0})
			pcap.Write(buf[:n])
		}
		if dir := guest.Out(); dir != "" {
			must(t, os.WriteFile(filepath.Join(dir, t.Name()+".pcap"), pcap.Bytes(), 0o644))
		}
		return frames
	}
}
