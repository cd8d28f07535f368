package ipam_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var (
	ctx     = context.Background()
	overlay = metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, VNI: 1042,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}}
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// service returns the client of a real lariat-metadata.
func service(t *testing.T) metadata.Client {
	t.Helper()
	return lab.Alone(t, overlay).Client()
}

func id(container string) metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: container, IfName: "eth0"}
}

func record(container, address string) journal.Record {
	return journal.Record{AttachmentID: id(container), State: journal.Held, Type: "lariat-vxlan", BootID: hostid.Boot(),
		Netns: "/run/netns/x", NetnsInode: 7,
		Attachment: metadata.Attachment{Network: "overlay",
			Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr(address), Sequence: 3}}}}
}

// same reports whether an attachment holds exactly these addresses.
func same(a *metadata.Attachment, want ...string) bool {
	have := []string{}
	for _, addr := range a.Addresses {
		have = append(have, addr.Address.String())
	}
	return slices.Equal(slices.Sorted(slices.Values(have)), slices.Sorted(slices.Values(want)))
}

// away is a book whose service does not answer.
func away(t *testing.T) ipam.Client {
	return ipam.Client{Service: metadata.Client{Socket: "/run/nobody"}, Journal: journal.New(t.TempDir()),
		Type: "lariat-ipam"}
}

func state(t *testing.T, b ipam.Client, container string) string {
	t.Helper()
	r, ok, err := b.Journal.Get("overlay", id(container))
	must(t, err)
	if !ok {
		return "none"
	}
	return r.State
}

func request(container string) metadata.AttachRequest {
	return metadata.AttachRequest{ContainerID: container, IfName: "eth0"}
}

// TestF19_F127_BookWithTheServiceAway: each call does what the journal alone allows.
func TestF19_F127_BookWithTheServiceAway(t *testing.T) {
	b := away(t)
	if _, err := b.Acquire(ctx, "overlay", request("c1"), ipam.Netns{}, nil); !errors.Is(err, metadata.ErrUnreachable) ||
		state(t, b, "c1") != "none" {
		t.Errorf("an address from nowhere: %v, record %s", err, state(t, b, "c1"))
	}
	explicit := &metadata.Attachment{Network: "overlay",
		Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr("10.42.0.9")}}}
	for range 2 {
		a, err := b.Acquire(ctx, "overlay", request("c1"), ipam.Netns{Path: "/run/netns/x", Inode: 7}, explicit)
		if err != nil || !same(a, "10.42.0.9") || state(t, b, "c1") != journal.Unregistered {
			t.Errorf("F19: %+v %v, record %s", a, err, state(t, b, "c1"))
		}
	}
	if a, err := b.Check(ctx, "overlay", id("c1")); err != nil || !same(a, "10.42.0.9") {
		t.Errorf("CHECK: %+v %v", a, err)
	}
	must(t, b.Release(ctx, "overlay", id("c1"))) // the service never knew: nothing is left to tell
	if state(t, b, "c1") != "none" {
		t.Errorf("record %s", state(t, b, "c1"))
	}

	must(t, b.Journal.Put(record("c2", "10.42.0.8")))
	if a, err := b.Acquire(ctx, "overlay", request("c2"), ipam.Netns{}, nil); err != nil || !same(a, "10.42.0.8") {
		t.Errorf("F3: what is recorded is not given again: %+v %v", a, err)
	}
	if a, err := b.Check(ctx, "overlay", id("c2")); err != nil || !same(a, "10.42.0.8") {
		t.Errorf("CHECK: %+v %v", a, err)
	}
	for range 2 {
		must(t, b.Release(ctx, "overlay", id("c2")))
		if state(t, b, "c2") != journal.Released {
			t.Errorf("the release is not noted: %s", state(t, b, "c2"))
		}
	}
	if _, err := b.Check(ctx, "overlay", id("c2")); err == nil {
		t.Error("CHECK passes after the release")
	}
	if _, err := b.Acquire(ctx, "overlay", request("c2"), ipam.Netns{}, nil); !errors.Is(err, metadata.ErrUnreachable) {
		t.Errorf("an address that was released is given again: %v", err)
	}

	old := record("c3", "10.42.0.7")
	old.BootID = "before"
	must(t, b.Journal.Put(old))
	if _, err := b.Acquire(ctx, "overlay", request("c3"), ipam.Netns{}, nil); !errors.Is(err, metadata.ErrUnreachable) {
		t.Errorf("F128: an address of an earlier boot is given again: %v", err)
	}

	must(t, b.Release(ctx, "overlay", id("c4"))) // of which no record is: it may have been killed before it wrote one
	if state(t, b, "c4") != journal.Released {
		t.Errorf("the release of the unknown is not noted: %s", state(t, b, "c4"))
	}

	must(t, b.Journal.Put(record("c5", "10.42.0.6")))
	must(t, b.Journal.Put(record("c6", "10.42.0.5")))
	must(t, b.Collect(ctx, "overlay", []metadata.AttachmentID{id("c5")}))
	if state(t, b, "c5") != journal.Held || state(t, b, "c6") != journal.Released {
		t.Errorf("GC: %s and %s", state(t, b, "c5"), state(t, b, "c6"))
	}
	// What cannot be noted either is an error, and names both causes.
	b.Journal.Dir = "/proc/nowhere"
	if err := b.Release(ctx, "overlay", id("c7")); !errors.Is(err, metadata.ErrUnreachable) ||
		!strings.Contains(err.Error(), "/proc/nowhere") {
		t.Errorf("%v", err)
	}
}

func holds(t *testing.T, c metadata.Client, container string) bool {
	t.Helper()
	_, err := c.Attachment(ctx, "overlay", id(container))
	if err != nil && !metadata.IsCode(err, metadata.CodeNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestBookWithTheService(t *testing.T) {
	b := ipam.Client{Service: service(t), Journal: journal.New(t.TempDir()), Type: "lariat-ipam"}
	first, err := b.Acquire(ctx, "overlay", request("d1"), ipam.Netns{Path: "/run/netns/x", Inode: 7}, nil)
	must(t, err)
	again, err := b.Acquire(ctx, "overlay", request("d1"), ipam.Netns{Path: "/run/netns/x", Inode: 7}, nil)
	if err != nil || first.Addresses[0] != again.Addresses[0] || state(t, b, "d1") != journal.Held {
		t.Errorf("F3: %+v and %+v, %v", first, again, err)
	}

	// The journal cannot be written: nothing new is held, and nothing old is lost.
	broken := b
	broken.Journal.Dir = "/proc/nowhere"
	_, err = broken.Acquire(ctx, "overlay", request("d2"), ipam.Netns{}, nil)
	var e *cni.Error
	if !errors.As(err, &e) || e.Code != cni.ErrIO || holds(t, b.Service, "d2") {
		t.Errorf("%v; held: %t", err, holds(t, b.Service, "d2"))
	}

	// F126: a release that comes late, with the sequence of the first life, does not hit the second.
	r, _, err := b.Journal.Get("overlay", id("d1"))
	must(t, err)
	must(t, b.Release(ctx, "overlay", id("d1")))
	if holds(t, b.Service, "d1") || state(t, b, "d1") != "none" {
		t.Error("not released")
	}
	_, err = b.Acquire(ctx, "overlay", request("d1"), ipam.Netns{}, nil)
	must(t, err)
	must(t, b.Service.Release(ctx, "overlay", id("d1"), r.Sequence()))
	if !holds(t, b.Service, "d1") {
		t.Error("F126: a late release freed the address of the next life")
	}

	// GC: what only the service knows goes too, what is listed stays.
	_, err = b.Service.Attach(ctx, "overlay", request("d3"))
	must(t, err)
	must(t, b.Collect(ctx, "overlay", []metadata.AttachmentID{id("d1")}))
	if holds(t, b.Service, "d3") || !holds(t, b.Service, "d1") {
		t.Errorf("GC: d3 %t, d1 %t", holds(t, b.Service, "d3"), holds(t, b.Service, "d1"))
	}
	if _, err := b.Check(ctx, "overlay", id("d3")); !metadata.IsCode(err, metadata.CodeNotFound) {
		t.Errorf("CHECK of what is gone: %v", err)
	}
	must(t, b.Collect(ctx, "nowhere", nil)) // a network that nobody created holds nothing
	must(t, b.Collect(ctx, "overlay", nil))
}

// TestStatus: exhaustion is an error of ADD, not of STATUS, unless the configuration is strict about it.
func TestStatus(t *testing.T) {
	c := service(t)
	must(t, c.Put(ctx, metadata.KindNetwork, "tiny", metadata.Network{Name: "tiny", Encapsulation: metadata.EncapVXLAN,
		VNI: 1043, BlockSizeV4: 30,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/30")}}))
	b := ipam.Client{Service: c, Journal: journal.New(t.TempDir()), Type: "lariat-ipam"}
	for i := 0; ; i++ {
		_, err := c.Attach(ctx, "tiny", request(fmt.Sprint("t", i)))
		if metadata.IsCode(err, metadata.CodeExhausted) {
			break
		}
		must(t, err)
	}
	t.Cleanup(func() {
		if _, err := c.GC(ctx, "tiny", nil); err != nil {
			t.Error(err)
		}
		if err := c.Delete(ctx, metadata.KindNetwork, "tiny"); err != nil {
			t.Error(err)
		}
	})
	for _, tc := range []struct {
		name, network string
		book          ipam.Client
		d             ipam.Definition
		strict        bool
		want          string // in the error; empty: none
	}{
		{"room", "overlay", b, ipam.Definition{}, true, ""},
		{"no address", "tiny", b, ipam.Definition{}, false, ""},
		{"no address, strict", "tiny", b, ipam.Definition{}, true, "no address left"},
		{"no network", "nowhere", b, ipam.Definition{}, false, "nowhere"},
		{"no network yet", "nowhere", b, ipam.Definition{Subnet: "10.1.0.0/16"}, false, ""},
		{"no service", "overlay", away(t), ipam.Definition{}, false, "metadata service unreachable"},
	} {
		_, err := ipam.Status(ctx, tc.book, tc.network, tc.d, tc.strict)
		var e *cni.Error
		if tc.want == "" && err != nil || tc.want != "" && (!errors.As(err, &e) || e.Code != cni.ErrNotAvailable ||
			!strings.Contains(e.Error(), tc.want)) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestDefinition(t *testing.T) {
	off := false
	for _, tc := range []struct {
		name, encap string
		d           ipam.Definition
		want        string // subnets, gateways, NAT; or the error
	}{
		{"nothing", metadata.EncapVXLAN, ipam.Definition{VNI: 7}, "none"},
		{"one subnet", metadata.EncapVXLAN, ipam.Definition{Subnet: "10.1.0.0/16"}, "[10.1.0.0/16] [] true"},
		{"two families", metadata.EncapVXLAN, ipam.Definition{Subnets: []string{"10.1.0.0/16", "fd00::/48"}, HostNAT: &off},
			"[10.1.0.0/16 fd00::/48] [] false"},
		{"flat, without a router: the first address is it", metadata.EncapNone,
			ipam.Definition{Subnets: []string{"10.1.0.0/16", "fd00::/64"}}, "[10.1.0.0/16 fd00::/64] [10.1.0.1 fd00::1] true"},
		{"flat, with one", metadata.EncapNone, ipam.Definition{Subnet: "10.1.0.0/16", Gateways: []string{"10.1.0.254"}},
			"[10.1.0.0/16] [10.1.0.254] true"},
		{"both keys", metadata.EncapVXLAN, ipam.Definition{Subnet: "10.1.0.0/16", Subnets: []string{"fd00::/48"}},
			`keys "subnet" and "subnets" contradict each other; give one of them`},
		{"no subnet", metadata.EncapVXLAN, ipam.Definition{Subnet: "10.1.0.0"},
			`key "subnet": netip.ParsePrefix("10.1.0.0"): no '/'`},
		{"no gateway", metadata.EncapNone, ipam.Definition{Subnet: "10.1.0.0/16", Gateways: []string{"x"}},
			`key "gateways": ParseAddr("x"): unable to parse IP`},
	} {
		n, err := tc.d.Create("x", tc.encap)
		got := "none"
		switch {
		case err != nil:
			got = err.Error()
		case n != nil:
			got = fmt.Sprint(n.Subnets, n.Gateways, n.HostNAT)
		}
		if got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestF20_PrefixLength(t *testing.T) {
	for in, want := range map[string]int{"": 0, "/24": 24, "/128": 128, "24": -1, "/0": -1, "/129": -1, "/-1": -1,
		"/24 ": -1, "/024": -1, "/": -1, "/x": -1} {
		got, err := ipam.Config{SubnetPrefixSize: in}.PrefixLength()
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q is %d, want %d (%v)", in, got, want, err)
		}
	}
}
