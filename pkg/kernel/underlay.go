package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Underlays lists the addresses of the current network namespace that could carry tunnels: global ones that last, on devices
// that are up and are neither Lariat's nor the loopback. They are sorted by device, then address, IPv4 first.
func Underlays() ([]metadata.Underlay, error) {
	addrs, err := RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	links := map[int]netlink.Link{}
	var out []metadata.Underlay
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		if !ok || a.Scope != int(netlink.SCOPE_UNIVERSE) || ip.IsLinkLocalUnicast() || ip.IsLoopback() {
			continue
		}
		if ip.Is6() && a.Flags&(unix.IFA_F_TEMPORARY|unix.IFA_F_DEPRECATED) != 0 {
			continue // will be gone before long
		}
		link, known := links[a.LinkIndex]
		if !known {
			if link, err = netlink.LinkByIndex(a.LinkIndex); err != nil {
				var gone netlink.LinkNotFoundError
				if errors.As(err, &gone) {
					continue
				}
				return nil, fmt.Errorf("device %d of address %s: %w", a.LinkIndex, ip, err)
			}
			links[a.LinkIndex] = link
		}
		attrs := link.Attrs()
		if attrs.Flags&net.FlagUp == 0 || attrs.Flags&net.FlagLoopback != 0 || strings.HasPrefix(attrs.Alias, delta.AliasPrefix) {
			continue
		}
		bits, _ := a.Mask.Size()
		out = append(out, metadata.Underlay{Address: netip.PrefixFrom(ip, bits), Device: attrs.Name, MTU: attrs.MTU})
	}
	slices.SortFunc(out, func(a, b metadata.Underlay) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), a.Address.Addr().Compare(b.Address.Addr()))
	})
	return out, nil
}

// Forwarding says whether the current network namespace forwards packets of each family.
func Forwarding() (v4, v6 bool) {
	on := func(key string) bool {
		b, err := os.ReadFile(sysctlRoot + key)
		return err == nil && strings.TrimSpace(string(b)) == "1"
	}
	return on("net/ipv4/ip_forward"), on("net/ipv6/conf/all/forwarding")
}

// ForwardPolicyDrops says whether some nftables or iptables-nft chain at the forward hook drops what no rule accepts, as Docker
// sets it, and names those chains (ip filter FORWARD). iptables-legacy is not seen.
func ForwardPolicyDrops() (chains []string, err error) {
	s, err := openSocket(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, nil // no nftables, no such chain
	}
	defer s.close()
	families := map[byte]string{nfprotoInet: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}
	err = s.dump(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETCHAIN, func(m *message) { m.raw(0, 0, 0, 0) }, func(_ uint16, body []byte) {
		if len(body) < 4 || families[body[0]] == "" {
			return
		}
		var table, name string
		policy, hook := uint32(verdictAccept), uint32(0)
		for a := newAttrs(body[4:]); a.next(); {
			switch a.typ {
			case unix.NFTA_CHAIN_TABLE:
				table = cstring(a.value)
			case unix.NFTA_CHAIN_NAME:
				name = cstring(a.value)
			case unix.NFTA_CHAIN_POLICY:
				policy = a.u32be()
			case unix.NFTA_CHAIN_HOOK:
				for h := newAttrs(a.value); h.next(); {
					if h.typ == unix.NFTA_HOOK_HOOKNUM {
						hook = h.u32be()
					}
				}
			}
		}
		if policy == verdictDrop && hook == uint32(slices.Index(hooks, "forward")) {
			chains = append(chains, families[body[0]]+" "+table+" "+name)
		}
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, errInterrupted) {
		err = nil // no nftables; or it changes, and Watch will tell
	}
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	return chains, nil
}
