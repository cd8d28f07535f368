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
		{"nothing changed", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.1/24", "eth0", 1500), underlay("198.51.100.1/24", "eth1", 1500)}, nil},
		{"another MTU", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.1/24", "eth0", 9000)}, list{underlay("192.0.2.1/24", "eth0", 9000)}},
		{"another length", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.1/16", "eth0", 1500)}, list{underlay("192.0.2.1/16", "eth0", 1500)}},
		{"the address moved to a bridge", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.1/24", "br0", 1500)}, list{underlay("192.0.2.1/24", "br0", 1500)}},
		{"the device got another address", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.9/24", "eth0", 1500)}, list{underlay("192.0.2.9/24", "eth0", 1500)}},
		{"the device got two others: nobody can tell which", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.8/24", "eth0", 1500), underlay("192.0.2.9/24", "eth0", 1500)}, nil},
		{"only one of another family is left", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("2001:db8::1/64", "eth0", 1500)}, nil},
		{"the device is gone; another one is not taken for it", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("198.51.100.1/24", "eth1", 1500)}, nil},
		{"no device at all", list{underlay("192.0.2.1/24", "eth0", 1500)}, nil, nil},
		{"the address is there, and a second one beside it", list{underlay("192.0.2.1/24", "eth0", 1500)}, list{underlay("192.0.2.0/24", "eth0", 1500), underlay("192.0.2.1/24", "eth0", 1500)}, nil},
		{"two, one of which changed", list{underlay("192.0.2.1/24", "eth0", 1500), underlay("2001:db8::1/64", "eth0", 1500)}, list{underlay("192.0.2.1/24", "eth0", 1500), underlay("2001:db8::2/64", "eth0", 1500)},
			list{underlay("192.0.2.1/24", "eth0", 1500), underlay("2001:db8::2/64", "eth0", 1500)}},
		{"none registered", nil, list{underlay("192.0.2.1/24", "eth0", 1500)}, nil},
	} {
		now, changed := follow(tc.registered, tc.seen)
		want := tc.want
		if want == nil {
			want = tc.registered
		}
		if !slices.Equal(now, want) || (len(changed) > 0) != (tc.want != nil) {
			t.Errorf("%s: %v, %q", tc.name, now, changed)
		}
		if tc.want != nil {
			if again, changed := follow(now, tc.seen); len(changed) > 0 {
				t.Errorf("%s: a second look changes it to %v", tc.name, again)
			}
			if fmt.Sprint(changed) == "[]" {
				t.Errorf("%s: nothing is said", tc.name)
			}
		}
	}
}
