package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/private"
	"github.com/lariat-net/lariat/pkg/service"
)

// config is what the flags say.
type config struct {
	HostName      string
	DataDir       string
	StateDir      string
	MachineIDFile string
	BootIDFile    string
	Underlay      []string
	Labels        map[string]string

	ListenTree string
	TreeLabels []string
	TreeOrigin string

	Endpoints      []string
	CA, Cert, Key  string
	Prefix         string
	Name           string
	ListenClient   string
	ListenPeer     string
	AdvertisePeer  string
	InitialCluster string
	Join           bool
	QuotaMiB       int64
	StartTimeout   time.Duration
	LeaseTTL       time.Duration
}

// flags declares the service's own flags; its sub-commands take some of them.
func (c *config) flags(f *pflag.FlagSet) {
	host, _ := os.Hostname()
	f.StringVar(&c.HostName, "host-name", host, "this host's name in the cluster")
	f.StringVar(&c.MachineIDFile, "machine-id-file", "/etc/machine-id", "what tells a reinstalled host from a second one")
	f.StringVar(&c.BootIDFile, "boot-id-file", hostid.BootFile, "what tells one boot from the next")
	f.StringVar(&c.StateDir, "state-dir", metadata.DefaultStateDir,
		"folder for the last valid values of entries that cannot be used any more")
	f.StringArrayVar(&c.Underlay, "underlay", nil, "address/length by which the other hosts reach this one, "+
		"repeated; default: of the default route")
	f.StringToStringVar(&c.Labels, "label", nil, "label of this host, key=value, repeated")
	f.StringVar(&c.ListenTree, "listen-tree", "", "IP:port of the read-only tree for containers, usually "+
		"169.254.169.250:80")
	f.StringArrayVar(&c.TreeLabels, "tree-label", nil, "name of a container's label that the tree shows to all "+
		"containers, or prefix*, repeated; those of services are always shown")
	f.StringVar(&c.TreeOrigin, "tree-allow-origin", "", "origin whose web pages may read the tree "+
		"(Access-Control-Allow-Origin), or *; empty: none")
	f.DurationVar(&c.StartTimeout, "start-timeout", time.Minute, "give up when the store was silent for so long")
	f.DurationVar(&c.LeaseTTL, "lease", 30*time.Second, "a host that is silent for so long counts as gone")
	c.storeFlags(f)
}

func (c *config) storeFlags(f *pflag.FlagSet) {
	f.StringVar(&c.DataDir, "data-dir", "/var/lib/lariat/etcd", "folder of the embedded store")
	f.StringSliceVar(&c.Endpoints, "etcd-endpoints", nil, "use this etcd instead of the embedded store: "+
		"https://host:port,…")
	f.StringVar(&c.CA, "etcd-ca", "", "CA certificates that etcd's peers must be signed by")
	f.StringVar(&c.Cert, "etcd-cert", "", "certificate of this host")
	f.StringVar(&c.Key, "etcd-key", "", "key of the certificate")
	f.StringVar(&c.Prefix, "etcd-prefix", "/lariat/v1/", "of all keys")
	f.StringVar(&c.Name, "name", "", "of this member of the embedded cluster; default: the host name")
	f.StringVar(&c.ListenClient, "listen-client", "", "let other hosts use the embedded store: https://IP:port")
	f.StringVar(&c.ListenPeer, "listen-peer", "", "for other members of the embedded cluster: https://IP:port")
	f.StringVar(&c.AdvertisePeer, "advertise-peer", "", "this member's URL in --initial-cluster; default: --listen-peer")
	f.StringVar(&c.InitialCluster, "initial-cluster", "", "all members: name=https://IP:port,…")
	f.BoolVar(&c.Join, "join", false, "the cluster runs already and expects this member")
	f.Int64Var(&c.QuotaMiB, "etcd-quota", 4096, "MiB that the embedded store may take")
}

const help = `lariat-metadata: the metadata service of one host

  lariat-metadata [flags]
  lariat-metadata backup [flags] FILE
  lariat-metadata restore [flags] FILE
`

// prepare is normalize for the service.
func (c *config) prepare(p *service.Process) error {
	if err := c.normalize(); err != nil {
		return err
	}
	syscall.Umask(0o077)                                        // nothing that the service makes is for others
	if info, err := os.Stat(c.Key); c.Key != "" && err == nil { // one that is not there is an error later
		if err := private.Check(c.Key, info); err != nil {
			p.Log.Warn("others can act as this host: the key of its certificate is not private", "err", err)
		}
	}
	return nil
}

// normalize fills in what follows from other flags, and refuses contradictions.
func (c *config) normalize() error {
	if c.Name == "" {
		c.Name = c.HostName
	}
	if !strings.HasSuffix(c.Prefix, "/") {
		c.Prefix += "/"
	}
	if len(c.Endpoints) > 0 && (c.ListenClient != "" || c.ListenPeer != "" || c.InitialCluster != "") {
		return errors.New("--etcd-endpoints uses an existing store; --listen-client, --listen-peer and " +
			"--initial-cluster are of the embedded one")
	}
	for _, e := range c.Endpoints {
		if err := safeEndpoint(e); err != nil {
			return err
		}
	}
	return nil
}

// safeEndpoint refuses to speak in clear to another machine.
func safeEndpoint(e string) error {
	scheme, rest, ok := strings.Cut(e, "://")
	if !ok {
		return fmt.Errorf("--etcd-endpoints %s: want https://host:port", e)
	}
	switch scheme {
	case "https", "unix":
		return nil
	case "http":
		host, _, err := net.SplitHostPort(rest)
		if ip := net.ParseIP(host); err == nil && (host == "localhost" || ip.IsLoopback()) {
			return nil
		}
	}
	return fmt.Errorf("--etcd-endpoints %s: want https://host:port; plain http is for loopback only", e)
}

// tls reads the client certificate for an external store; nil when none of its endpoints is https.
func (c *config) tls() (*tls.Config, error) {
	if !strings.HasPrefix(strings.Join(c.Endpoints, ","), "https://") {
		return nil, nil
	}
	if c.CA == "" || c.Cert == "" || c.Key == "" {
		return nil, errors.New("--etcd-endpoints with https needs --etcd-ca, --etcd-cert and --etcd-key; `lariat certs` " +
			"makes them")
	}
	pem, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, fmt.Errorf("--etcd-ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--etcd-ca %s: no certificate in it", c.CA)
	}
	if _, err := tls.LoadX509KeyPair(c.Cert, c.Key); err != nil {
		return nil, fmt.Errorf("--etcd-cert %s, --etcd-key %s: %w", c.Cert, c.Key, err)
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12,
		// Read for each connection, so that a renewed certificate needs no restart.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
			return &pair, err
		}}, nil
}

// underlay finds the addresses by which other hosts reach this one.
func (c *config) underlay() ([]metadata.Underlay, error) {
	links, err := kernel.RetryDump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	all, err := kernel.RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	byIndex := map[int]netlink.Link{}
	for _, l := range links {
		byIndex[l.Attrs().Index] = l
	}
	type candidate struct {
		u     metadata.Underlay
		index int
		auto  bool // may be chosen unasked
	}
	const passing = unix.IFA_F_TEMPORARY | unix.IFA_F_DEPRECATED
	var list []candidate
	var known []string
	for _, a := range all {
		l := byIndex[a.LinkIndex]
		ip, ok := netip.AddrFromSlice(a.IP)
		if l == nil || !ok {
			continue
		}
		ones, _ := a.Mask.Size()
		u := metadata.Underlay{Address: netip.PrefixFrom(ip.Unmap(), ones), Device: l.Attrs().Name, MTU: l.Attrs().MTU}
		auto := ip.IsGlobalUnicast() && l.Attrs().Flags&net.FlagUp != 0 && l.Attrs().Flags&net.FlagLoopback == 0 &&
			!strings.HasPrefix(l.Attrs().Alias, "lariat:") && !virtual(l) && (ip.Unmap().Is4() || a.Flags&passing == 0)
		list = append(list, candidate{u, a.LinkIndex, auto})
		known = append(known, u.Address.String())
	}
	if len(c.Underlay) > 0 {
		var out []metadata.Underlay
		for _, s := range c.Underlay {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, fmt.Errorf("--underlay %s: want address/length: %w", s, err)
			}
			found := false
			for _, x := range list {
				if !found && x.u.Address.Addr() == p.Addr() {
					found = true
					out = append(out, metadata.Underlay{Address: p, Device: x.u.Device, MTU: x.u.MTU})
				}
			}
			if !found {
				return nil, fmt.Errorf("--underlay %s: no interface has it; this host has %s", s, strings.Join(known, ", "))
			}
		}
		return out, nil
	}
	var out []metadata.Underlay
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := kernel.RetryDump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		of := func(match func(candidate) bool) (us []metadata.Underlay) {
			for _, x := range list {
				if x.auto && x.u.Address.Addr().Is4() == (family == netlink.FAMILY_V4) && match(x) {
					us = append(us, x.u)
				}
			}
			return us
		}
		chosen := choose(of(func(candidate) bool { return true }), netip.Addr{})
		metric := -1
		for _, r := range routes {
			if r.Dst != nil && !r.Dst.IP.IsUnspecified() || metric >= 0 && r.Priority >= metric {
				continue
			}
			there := of(func(x candidate) bool {
				return x.index == r.LinkIndex && (r.Src == nil || r.Src.Equal(x.u.Address.Addr().AsSlice()))
			})
			if len(there) > 0 {
				gateway, _ := netip.AddrFromSlice(r.Gw)
				chosen, metric = choose(there, gateway.Unmap()), r.Priority
			}
		}
		if chosen.Address.IsValid() {
			out = append(out, chosen)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no address found by which other hosts could reach this one; give it with --underlay "+
			"IP/len (this host has %s)", strings.Join(known, ", "))
	}
	return out, nil
}

// choose returns the address by which other hosts reach this one, of those that an interface has: the one from
// which the kernel speaks to the gateway, because the gateway is in its subnet. An address without a subnet comes
// last: it may be a virtual one, which moves between machines (VRRP), and may well be listed first.
func choose(list []metadata.Underlay, gateway netip.Addr) (best metadata.Underlay) {
	rank := func(u metadata.Underlay) int {
		switch {
		case u.Address.IsSingleIP():
			return 2
		case !u.Address.Contains(gateway):
			return 1
		}
		return 0
	}
	for _, u := range list {
		if !best.Address.IsValid() || rank(u) < rank(best) {
			best = u
		}
	}
	return best
}

// virtual interfaces carry containers, not hosts. A veth may be a host's uplink all the same, when the host
// is a namespace.
func virtual(l netlink.Link) bool {
	switch l.Type() {
	case "vxlan", "geneve", "wireguard", "xfrm", "ipip", "sit", "dummy":
		return true
	}
	name := l.Attrs().Name
	for _, p := range []string{"docker", "br-", "cni", "podman", "virbr", "kube-", "flannel", "cali"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// memberURL finds a member's URL in an --initial-cluster list.
func memberURL(cluster, name string) string {
	for _, m := range strings.Split(cluster, ",") {
		if n, u, ok := strings.Cut(m, "="); ok && n == name {
			return u
		}
	}
	return ""
}
