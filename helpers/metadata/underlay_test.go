package main

import (
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
)

// TestUnderlayChosenUnasked: the address from which the kernel speaks to the gateway, whatever stands beside it.
func TestUnderlayChosenUnasked(t *testing.T) {
	const vip, own = "ip addr add 192.0.2.100/32 dev eth0; ", "ip addr add 192.0.2.2/24 dev eth0; "
	for _, tc := range []struct{ name, set, want string }{
		{"a virtual address listed first", vip + own + "ip route add default via 192.0.2.1", "192.0.2.2/24"},
		{"no default route", vip + own, "192.0.2.2/24"},
		{"another subnet listed first", "ip addr add 198.51.100.2/24 dev eth0; " + own + "ip route add default via 192.0.2.1",
			"192.0.2.2/24"},
		{"the route says which", own + "ip addr add 192.0.2.3/24 dev eth0; ip route add default via 192.0.2.1 src 192.0.2.3",
			"192.0.2.3/24"},
		{"nothing but an address of its own", "ip addr add 192.0.2.2/32 dev eth0; ip route add default via 192.0.2.1 " +
			"dev eth0 onlink", "192.0.2.2/32"},
		{"of two default routes the better", own +
			"ip addr add 203.0.113.2/24 dev eth1; ip route add default via 203.0.113.1 metric 50; ip route add default via " +
			"192.0.2.1 metric 100",
			"203.0.113.2/24"},
		{"IPv6", "ip addr add 2001:db8::100/128 dev eth0 nodad; ip addr add 2001:db8::2/64 dev eth0 nodad; ip -6 route " +
			"add default via fe80::1 dev eth0", "2001:db8::2/64"},
		{"IPv6 that will be gone", "ip addr add 2001:db8::7/64 dev eth0 nodad preferred_lft 0; ip addr add " +
			"2001:db8::2/64 dev eth0 nodad; ip -6 route add default via 2001:db8::1 dev eth0",
			"2001:db8::2/64"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ns := netnstest.New(t)
			for _, dev := range []string{"eth0", "eth1"} {
				ns.Command(t, "ip", "link", "add", dev, "type", "veth", "peer", "name", "to"+dev)
				ns.Command(t, "ip", "link", "set", dev, "up")
				ns.Command(t, "ip", "link", "set", "to"+dev, "up")
			}
			ns.Command(t, "sh", "-ec", tc.set)
			ns.Do(t, func() {
				got, err := (&config{}).underlay()
				var list []string
				for _, u := range got {
					list = append(list, u.Address.String())
				}
				if err != nil || strings.Join(list, " ") != tc.want {
					t.Errorf("%v %v, want %s", list, err, tc.want)
				}
			})
		})
	}
}
