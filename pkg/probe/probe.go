// Package probe tests the features of this kernel and this process in temporary network namespaces.
// Only a test gives a certain answer: modules load on first use, configurations may be wrong, and
// containers may forbid. Package probe changes nothing outside of these namespaces.
//
// "lariat doctor" calls Check. Tests call Need, which skips a test and names the missing features.
// REQUIRE=vxlan,nftfib (or REQUIRE=all) turns such a skip into a failure.
// Therefore coverage cannot shrink unseen.
package probe

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
)

// A Feature is a feature that a kernel may lack. Its text is its name in REQUIRE.
type Feature string

// The features.
const (
	NetNS          Feature = "netns"   // the right to create network namespaces
	UserNS         Feature = "userns"  // the right to create user namespaces
	Veth           Feature = "veth"    // pairs of devices
	VXLAN          Feature = "vxlan"   // tunnel devices
	NexthopObjects Feature = "nexthop" // routes by the id of a nexthop (Linux 5.3)
	Nft            Feature = "nft"     // nftables, family inet
	NftFib         Feature = "nftfib"  // reverse path lookups in nftables
	NftCT          Feature = "nftct"   // connection tracking in nftables
	NftNAT         Feature = "nftnat"  // masquerade in nftables, family inet (Linux 5.2)
	Macvlan        Feature = "macvlan" // devices that share another one's link
	IFB            Feature = "ifb"     // devices for shaping of incoming packets
	IPv6           Feature = "ipv6"    // IPv6 in general
	Dummy          Feature = "dummy"   // devices without a link
	Bridge         Feature = "bridge"  // software switches
	ESP            Feature = "esp"     // IPsec's encapsulation over IPv4, with any cipher
	ESP6           Feature = "esp6"    // the same over IPv6
	AESGCM         Feature = "aesgcm"  // ESP with the cipher rfc4106(gcm(aes))
	XfrmInterface  Feature = "xfrmi"   // devices that are bound to IPsec policies by an id (Linux 4.19)
)

var tries = map[Feature]func() error{
	NetNS:   func() error { return inside(func() error { return nil }) },
	UserNS:  userNS,
	Veth:    func() error { return link(&netlink.Veth{LinkAttrs: attrs(), PeerName: "peer"}) },
	IFB:     func() error { return link(&netlink.Ifb{LinkAttrs: attrs()}) },
	Dummy:   func() error { return link(&netlink.Dummy{LinkAttrs: attrs()}) },
	Bridge:  func() error { return link(&netlink.Bridge{LinkAttrs: attrs()}) },
	Macvlan: macvlan,
	IPv6: func() error {
		return inside(func() error {
			_, err := os.Stat("/proc/sys/net/ipv6")
			return err
		})
	},
	VXLAN: func() error { return apply(func(s *delta.State) { device(s) }) },
	NexthopObjects: func() error {
		return apply(func(s *delta.State) {
			dev := device(s)
			// The kernel accepts no gateway in a namespace without an IPv4 address.
			s.Addrs[delta.Addr{Dev: dev, Prefix: netip.MustParsePrefix("203.0.113.1/32")}] = struct{}{}
			s.Nexthops[1] = delta.Nexthop{Via: netip.MustParseAddr("192.0.2.2"), Dev: dev, Onlink: true}
			s.Routes[delta.To(netip.MustParsePrefix("198.51.100.0/24"))] = delta.Route{NH: 1}
		})
	},
	ESP: func() error { return remedy(esp("192.0.2.1", "192.0.2.2", ciphers...), "module esp4, CONFIG_INET_ESP") },
	ESP6: func() error {
		return remedy(esp("2001:db8::1", "2001:db8::2", ciphers...), "module esp6, CONFIG_INET6_ESP")
	},
	AESGCM: func() error { return remedy(esp("192.0.2.1", "192.0.2.2", gcm), "modules esp4, gcm, seqiv and aes") },
	XfrmInterface: func() error {
		return remedy(link(&netlink.Xfrmi{LinkAttrs: attrs(), Ifid: 1}), "module xfrm_interface, CONFIG_XFRM_INTERFACE")
	},
	Nft:    func() error { return chain("filter", "input", delta.Verdict("accept")) },
	NftFib: func() error { return chain("filter", "prerouting", delta.NoReverse{}, delta.Verdict("drop")) },
	NftCT: func() error {
		return errors.Join(chain("filter", "output", delta.Notrack{}),
			chain("filter", "forward", delta.CtReply{}, delta.Verdict("accept")))
	},
	NftNAT: func() error { return chain("nat", "postrouting", delta.Masquerade{}) },
}

var (
	mu      sync.Mutex
	results = map[Feature]error{}
)

// Check returns an error that says why a feature is missing. A test takes some milliseconds.
// Check remembers a present feature for the life of the process, and tests a missing one again.
func Check(f Feature) error {
	try, ok := tries[f]
	if !ok {
		return fmt.Errorf("unknown feature %q", string(f))
	}
	mu.Lock()
	defer mu.Unlock()
	err, known := results[f]
	if !known {
		if err = try(); err != nil {
			err = fmt.Errorf("%s: %w", f, err)
		}
		if err == nil { // a missing feature may be loaded later
			results[f] = nil
		}
	}
	return err
}

// All lists the features, sorted.
func All() []Feature {
	out := make([]Feature, 0, len(tries))
	for f := range tries {
		out = append(out, f)
	}
	slices.Sort(out)
	return out
}

// Short reports whether this is a test under "go test -short", which creates no namespaces.
// Flags must be parsed.
func Short() bool {
	f := flag.Lookup("test.short")
	return f != nil && f.Value.String() == "true"
}

// TB is the part of testing.TB that Need uses.
// With testing.TB, programs that link Check would link package testing.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Need skips a test when features are missing, and names them.
// It fails the test when the environment variable REQUIRE lists a missing feature or is "all".
func Need(t TB, features ...Feature) {
	t.Helper()
	if Short() {
		t.Skipf("-short: no namespaces are made; this needs %v", features)
	}
	need(t, os.Getenv("REQUIRE"), Check, features)
}

func need(t TB, require string, check func(Feature) error, features []Feature) {
	t.Helper()
	required := strings.FieldsFunc(require, func(r rune) bool { return r == ',' || r == ' ' })
	var missing []error
	fatal := false
	for _, f := range features {
		if err := check(f); err != nil {
			missing = append(missing, err)
			fatal = fatal || slices.Contains(required, string(f)) || slices.Contains(required, "all")
		}
	}
	switch {
	case fatal:
		t.Fatalf("missing, and REQUIRE=%s: %v", require, errors.Join(missing...))
	case len(missing) > 0:
		t.Skipf("missing: %v", errors.Join(missing...))
	}
}

// inside calls f on a thread in a new network namespace. Thread and namespace end with the call.
func inside(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("create a network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

func attrs() netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = "probe"
	return a
}

func link(l netlink.Link) error {
	return inside(func() error { return netlink.LinkAdd(l) })
}

// remedy adds the kernel's module or configuration of a feature to an error.
func remedy(err error, what string) error {
	if err != nil {
		err = fmt.Errorf("%w; what it takes of the kernel: %s", err, what)
	}
	return err
}

// ciphers are the ciphers for the test of security associations. The likeliest cipher comes first.
var (
	gcm = netlink.XfrmState{Aead: &netlink.XfrmStateAlgo{Name: "rfc4106(gcm(aes))", Key: make([]byte, 20),
		ICVLen: 128}}
	ciphers = []netlink.XfrmState{
		gcm,
		{
			Crypt: &netlink.XfrmStateAlgo{Name: "cbc(aes)", Key: make([]byte, 16)},
			Auth:  &netlink.XfrmStateAlgo{Name: "hmac(sha256)", Key: make([]byte, 32), TruncateLen: 128},
		},
		{
			Crypt: &netlink.XfrmStateAlgo{Name: "ecb(cipher_null)"},
			Auth:  &netlink.XfrmStateAlgo{Name: "hmac(sha1)", Key: make([]byte, 20), TruncateLen: 96},
		},
	}
)

// esp creates a security association in tunnel mode with one of the ciphers.
// The kernel refuses an unknown protocol and an unknown cipher with different errors.
// esp returns all errors.
func esp(src, dst string, with ...netlink.XfrmState) error {
	return inside(func() error {
		var errs []error
		for _, sa := range with {
			sa.Src, sa.Dst = netip.MustParseAddr(src).AsSlice(), netip.MustParseAddr(dst).AsSlice()
			sa.Proto, sa.Mode, sa.Spi = netlink.XFRM_PROTO_ESP, netlink.XFRM_MODE_TUNNEL, 0x100
			err := netlink.XfrmStateAdd(&sa)
			if err == nil {
				return nil
			}
			name := ""
			if sa.Aead != nil {
				name = sa.Aead.Name
			} else {
				name = sa.Crypt.Name + " " + sa.Auth.Name
			}
			errs = append(errs, fmt.Errorf("add a security association of ESP with %s: %w", name, err))
			if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EPERM) {
				break // another cipher does not help
			}
		}
		return errors.Join(errs...)
	})
}

func macvlan() error {
	return inside(func() error {
		parent := &netlink.Veth{LinkAttrs: attrs(), PeerName: "peer"}
		if err := netlink.LinkAdd(parent); err != nil {
			return err
		}
		l, err := netlink.LinkByName("peer")
		if err != nil {
			return err
		}
		a := attrs()
		a.Name, a.ParentIndex = "macvlan", l.Attrs().Index
		return netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE})
	})
}

// apply creates a state with the production code.
func apply(build func(s *delta.State)) error {
	return inside(func() error {
		k, err := kernel.New()
		if err != nil {
			return err
		}
		defer k.Close()
		s := delta.NewState()
		build(s)
		_, err = kernel.Reconcile(context.Background(), k, s)
		return err
	})
}

func device(s *delta.State) string {
	s.Links["probe"] = delta.Link{Kind: "vxlan", VNI: 1, Port: 4789, Local: netip.MustParseAddr("192.0.2.1"),
		MAC: delta.MAC{2, 0, 0, 0, 0, 1}, MTU: 1450, Alias: delta.AliasPrefix + "probe"}
	return "probe"
}

func chain(kind, hook string, r ...delta.Statement) error {
	return apply(func(s *delta.State) {
		s.Chains["probe"] = delta.Chain{Type: kind, Hook: hook, Rules: []delta.Rule{r}}
	})
}

// userNS starts a program that does not exist. The kernel creates the namespaces before it looks for
// the program.
func userNS() error {
	_, err := os.StartProcess("/nonexistent/lariat-probe", []string{"probe"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("create a user namespace: %w", err)
}
