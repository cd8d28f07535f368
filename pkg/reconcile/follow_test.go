package reconcile

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func underlay(address, device string, mtu int) metadata.Underlay {
	return metadata.Underlay{Address: netip.MustParsePrefix(address), Device: device, MTU: mtu}
}

func TestF28_F139_Follow(t *testing.T) {
	type list = []metadata.Underlay
	for _, tc := range []struct {
		name             string
		registered, seen list
		want             list
	}{
		{"nothing changed", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("192.0.2.1/24", "eth0", 1500), underlay("198.51.100.1/24", "eth1", 1500)}, nil},
		{"another MTU", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.1/24", "eth0", 9000)},
			list{underlay("192.0.2.1/24", "eth0", 9000)}},
		{"another length", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.1/16", "eth0", 1500)},
			list{underlay("192.0.2.1/16", "eth0", 1500)}},
		{"the address moved to a bridge", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("192.0.2.1/24", "br0", 1500)}, list{underlay("192.0.2.1/24", "br0", 1500)}},
		{"the device got another address", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("192.0.2.9/24", "eth0", 1500)}, list{underlay("192.0.2.9/24", "eth0", 1500)}},
		{"the device got two others: nobody can tell which", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("192.0.2.8/24", "eth0", 1500), underlay("192.0.2.9/24", "eth0", 1500)}, nil},
		{"only one of another family is left", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("2001:db8::1/64", "eth0", 1500)}, nil},
		{"the device is gone; another one is not taken for it", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("198.51.100.1/24", "eth1", 1500)}, nil},
		{"no device at all", list{underlay("192.0.2.1/24", "eth0", 1500)}, nil, nil},
		{"the address is there, and a second one beside it", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("192.0.2.0/24", "eth0", 1500), underlay("192.0.2.1/24", "eth0", 1500)}, nil},
		{"two, one of which changed", list{underlay("192.0.2.1/24", "eth0", 1500), underlay("2001:db8::1/64", "eth0", 1500)},
			list{underlay("192.0.2.1/24", "eth0", 1500), underlay("2001:db8::2/64", "eth0", 1500)},
			list{underlay("192.0.2.1/24", "eth0", 1500), underlay("2001:db8::2/64", "eth0", 1500)}},
		{"a virtual address is left", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("192.0.2.100/32", "eth0", 1500)}, nil},
		{"another one beside a virtual address", list{underlay("192.0.2.1/24", "eth0", 1500)},
			list{underlay("192.0.2.100/32", "eth0", 1500), underlay("192.0.2.9/24", "eth0", 1500)},
			list{underlay("192.0.2.9/24", "eth0", 1500)}},
		{"a host whose address stands alone got another", list{underlay("192.0.2.1/32", "eth0", 1500)},
			list{underlay("192.0.2.9/32", "eth0", 1500)}, list{underlay("192.0.2.9/32", "eth0", 1500)}},
		{"none registered", nil, list{underlay("192.0.2.1/24", "eth0", 1500)}, nil},
	} {
		now, changed := follow(tc.registered, tc.seen, map[netip.Addr]netip.Addr{})
		want := tc.want
		if want == nil {
			want = tc.registered
		}
		if !slices.Equal(now, want) || (len(changed) > 0) != (tc.want != nil) {
			t.Errorf("%s: %v, %q", tc.name, now, changed)
		}
		if tc.want != nil {
			if again, changed := follow(now, tc.seen, map[netip.Addr]netip.Addr{}); len(changed) > 0 {
				t.Errorf("%s: a second look changes it to %v", tc.name, again)
			}
			if fmt.Sprint(changed) == "[]" {
				t.Errorf("%s: nothing is said", tc.name)
			}
		}
	}
}

// TestFollowHome: what was adopted while the host's own address was away goes back with its return, also by way of
// another.
func TestFollowHome(t *testing.T) {
	own, vip, vip2 := underlay("192.0.2.1/24", "eth0", 1500), underlay("192.0.2.100/24", "eth0", 1500),
		underlay("192.0.2.101/24", "eth0", 1500)
	home := map[netip.Addr]netip.Addr{}
	now := []metadata.Underlay{own}
	for i, step := range []struct {
		links []metadata.Underlay
		want  metadata.Underlay
	}{
		{[]metadata.Underlay{vip, own}, own},
		{[]metadata.Underlay{vip}, vip},
		{[]metadata.Underlay{vip2}, vip2},
		{nil, vip2},
		{[]metadata.Underlay{own, vip, vip2}, own},
		{[]metadata.Underlay{vip2, own}, own},
	} {
		now, _ = follow(now, step.links, home)
		if !slices.Equal(now, []metadata.Underlay{step.want}) {
			t.Fatalf("step %d: %v, want %v", i, now, step.want)
		}
	}
	if len(home) > 0 {
		t.Errorf("remembered for nothing: %v", home)
	}
}
