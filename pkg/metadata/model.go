// Package metadata holds Lariat's model of a cluster: hosts, networks, blocks of addresses, and
// containers. It also has the small client with which every executable queries the model.
//
// The model is the data from which a host plans its network. The package does not touch the kernel,
// the store or a clock. Every CNI executable links it, so its start-up is part of every container's
// start-up. So it imports nothing heavy (no net/http, no gRPC).
package metadata

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Encapsulations that a network can use between hosts.
const (
	EncapVXLAN = "vxlan" // RFC 7348
	EncapIPsec = "ipsec" // ESP tunnels keyed by IKEv2
	EncapNone  = "none"  // a flat network: the physical LAN carries packets, Lariat only allocates addresses
)

// MAC is a 48-bit Ethernet address. Unlike net.HardwareAddr it is comparable; its zero value means "not set".
type MAC [6]byte

// ParseMAC reads the colon form, "0e:00:c0:00:02:01".
func ParseMAC(s string) (MAC, error) {
	var m MAC
	if len(s) != 17 || strings.Count(s, ":") != 5 {
		return m, fmt.Errorf("MAC address %q: want six colon-separated octets", s)
	}
	if n, err := hex.Decode(m[:], []byte(strings.ReplaceAll(s, ":", ""))); err != nil || n != 6 {
		return MAC{}, fmt.Errorf("MAC address %q: want six colon-separated octets", s)
	}
	return m, nil
}

func (m MAC) String() string { return string(m.Append(nil)) }

// Append appends the colon form, also of an address that is not set.
func (m MAC) Append(b []byte) []byte {
	const digits = "0123456789abcdef"
	for i, c := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, digits[c>>4], digits[c&15])
	}
	return b
}

// IsZero reports whether the address is not set.
func (m MAC) IsZero() bool { return m == MAC{} }

// MarshalText writes the colon form, or nothing when the address is not set.
func (m MAC) MarshalText() ([]byte, error) {
	if m.IsZero() {
		return nil, nil
	}
	return []byte(m.String()), nil
}

// UnmarshalText reads the colon form; empty text means not set.
func (m *MAC) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*m = MAC{}
		return nil
	}
	v, err := ParseMAC(string(b))
	*m = v
	return err
}

// Underlay is one address by which other hosts reach this host.
type Underlay struct {
	Address netip.Prefix `json:"address"` // with the length of the link's own prefix: 192.0.2.1/24
	Device  string       `json:"device"`  // the interface that carries it, on that host
	MTU     int          `json:"mtu"`     // of that interface, in bytes
}

// Foreign is a host's route to addresses that are not Lariat's: a link of the host, or a foreign
// route.
type Foreign struct {
	Prefix netip.Prefix `json:"prefix"`
	Device string       `json:"device,omitempty"`
	Via    netip.Addr   `json:"via,omitzero"` // the gateway; invalid: the host is on the link itself
}

// String is the route as ip prints it.
func (f Foreign) String() string {
	s := f.Prefix.String()
	if f.Via.IsValid() {
		s += " via " + f.Via.String()
	}
	if f.Device != "" {
		s += " dev " + f.Device
	}
	return s
}

// Host is one machine of the cluster. Tunnels use the first underlay address.
type Host struct {
	Name     string            `json:"name"`
	Underlay []Underlay        `json:"underlay"`
	Labels   map[string]string `json:"labels,omitempty"`
	// from /etc/machine-id; distinguishes a reinstalled host from a second one
	MachineID   string `json:"machineID"`
	BootID      string `json:"bootID"` // of /proc/sys/kernel/random/boot_id
	MAC         MAC    `json:"mac,omitzero"`
	IKEIdentity string `json:"ikeIdentity,omitempty"` // default: the name
	// ids of the secrets of encrypted networks that this host has loaded
	IKEKeys      []string `json:"ikeKeys,omitempty"`
	AgentVersion string   `json:"agentVersion,omitempty"`
	// at most MaxForeign; the underlay's own link is not among them
	Foreign []Foreign `json:"foreign,omitempty"`
	Joined  time.Time `json:"joined,omitzero"`

	// Live is derived, never stored: the host's metadata service holds its lease.
	Live bool `json:"live,omitempty"`
}

// UnderlayAddr returns the address that tunnels to this host use, or the zero Addr when the host
// has none.
func (h Host) UnderlayAddr() netip.Addr {
	if len(h.Underlay) == 0 {
		return netip.Addr{}
	}
	return h.Underlay[0].Address.Addr()
}

// On returns the links of the host that have addresses of the prefix.
func (h Host) On(p netip.Prefix) (out []Foreign) {
	for _, f := range h.Foreign {
		if !f.Via.IsValid() && f.Prefix.Overlaps(p) {
			out = append(out, f)
		}
	}
	return out
}

// Network is one address space that spans hosts.
type Network struct {
	Name          string         `json:"name"`
	Subnets       []netip.Prefix `json:"subnets"` // at most one of each family
	BlockSizeV4   int            `json:"blockSizeV4,omitempty"`
	BlockSizeV6   int            `json:"blockSizeV6,omitempty"`
	Encapsulation string         `json:"encapsulation"`
	VNI           uint32         `json:"vni,omitempty"`
	Port          uint16         `json:"port,omitempty"` // UDP
	// of the containers' interfaces; 0: from the underlay
	MTU           int            `json:"mtu,omitempty"`
	HostNAT       bool           `json:"hostNAT"` // masquerade what leaves the network
	HostNATExempt []netip.Prefix `json:"hostNATExempt,omitempty"`
	// networks, AllowAll or outside prefixes whose packets may come in
	AllowFrom      []string `json:"allowFrom,omitempty"`
	HostPorts      bool     `json:"hostPorts,omitempty"`
	DirectRouting  bool     `json:"directRouting,omitempty"` // plain routes to hosts on the same link
	StrictAffinity bool     `json:"strictAffinity,omitempty"`
	// rest of a released address; 0: DefaultCooldown
	CooldownSeconds int                        `json:"cooldownSeconds,omitempty"`
	Exclude         []string                   `json:"exclude,omitempty"`  // address, prefix, or first-last
	Gateways        []netip.Addr               `json:"gateways,omitempty"` // of a flat network: the LAN's routers
	IsDefault       bool                       `json:"isDefault,omitempty"`
	CNIConfig       map[string]json.RawMessage `json:"cniConfig,omitempty"` // file name to conflist
	Created         time.Time                  `json:"created,omitzero"`
}

// MarshalJSON writes the fields by their tags. Because of this method, encoding/json does not
// analyse the whole type for a request with a nil *Network, as nearly all requests are. That saves
// a tenth of a millisecond in a process that lives for four.
func (n Network) MarshalJSON() ([]byte, error) {
	type plain Network
	return json.Marshal(plain(n))
}

// Defaults of a network.
const (
	DefaultBlockSizeV4 = 26
	DefaultBlockSizeV6 = 122
	DefaultPort        = 4789 // IANA, RFC 7348 §8
	DefaultVNI         = 1042 // Rancher's; further networks count up from it
	DefaultCooldown    = 60 * time.Second
)

// ProbePort is the UDP port at which network managers answer each other's probes: the port before
// VXLAN's. IANA has not assigned it for UDP.
const ProbePort = 4788

// StorePorts are the TCP ports of the store, for clients and between its members, by default: etcd's.
var StorePorts = []uint16{2379, 2380}

// AllowAll stands for every network in Network.AllowFrom.
const AllowAll = "all"

// HasIPv6 reports whether the network has a subnet of IPv6.
func (n Network) HasIPv6() bool {
	return slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// Allows reports whether containers of another network may reach this one's.
func (n Network) Allows(network string) bool {
	return slices.Contains(n.AllowFrom, AllowAll) || slices.Contains(n.AllowFrom, network)
}

// Crosses returns a host's foreign routes to addresses of the network. Flat networks are such
// routes themselves.
func (n Network) Crosses(h Host) (out []Foreign) {
	if n.Encapsulation == EncapNone {
		return nil
	}
	for _, f := range h.Foreign {
		if slices.ContainsFunc(n.Subnets, f.Prefix.Overlaps) {
			out = append(out, f)
		}
	}
	return out
}

// AllowedPrefixes returns the sources outside all networks that may reach this network's containers
// without a published port.
func (n Network) AllowedPrefixes() (out []netip.Prefix) {
	for _, s := range n.AllowFrom {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// A Block is a part of a network's subnet from which one host allocates addresses.
type Block struct {
	Network string       `json:"network"`
	CIDR    netip.Prefix `json:"cidr"`
	Host    string       `json:"host"`

	// Gateway is the host's own overlay address of this family, on its first block of the network; unset on
	// further blocks. It is part of the block, not an allocation, so that every host's plan follows from
	// the network view alone.
	Gateway netip.Addr `json:"gateway,omitzero"`
}

// HostRoute is an address that no block of its host covers.
type HostRoute struct {
	Network string     `json:"network"`
	Address netip.Addr `json:"address"`
	Host    string     `json:"host"`
}

// Container is the owner of attachments, as people and the tree know it.
type Container struct {
	ID         string            `json:"id"`
	UUID       string            `json:"uuid,omitempty"`
	Name       string            `json:"name,omitempty"`
	Host       string            `json:"host"`
	Network    string            `json:"network,omitempty"` // of its first interface
	Addresses  []netip.Addr      `json:"addresses,omitempty"`
	MAC        MAC               `json:"mac,omitzero"`
	Ports      []string          `json:"ports,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Links      map[string]string `json:"links,omitempty"`
	State      string            `json:"state,omitempty"`
	Health     string            `json:"health,omitempty"`
	StartCount int               `json:"startCount,omitempty"`
	Created    time.Time         `json:"created,omitzero"`

	// The metadata service maintains Interfaces: the addresses that attachments of this container
	// hold. With PreAssigned, the writer of the object assigned its Addresses. Those outlive the
	// attachments.
	Interfaces  []ContainerInterface `json:"interfaces,omitempty"`
	PreAssigned bool                 `json:"preAssigned,omitempty"`

	// The metadata service maintains Written: a PUT wrote the object. An object without it was
	// created by an ADD and ends with its last attachment.
	Written bool `json:"written,omitempty"`
}

// IsWritten reports whether a PUT wrote the object. Earlier versions have no Written. There the
// traces of an ADD decide. An ADD leaves no object without attachments, and no pre-assigned object.
// The exception is an object of another ADD that was moved, with its UUID and creation time, to a
// new id.
func (c Container) IsWritten() bool {
	if c.PreAssigned {
		return c.Written || c.UUID == "" || c.Created.IsZero()
	}
	return c.Written || len(c.Interfaces) == 0
}

// Holds returns the addresses of the container's interfaces. Without any it returns those that the
// object names.
func (c Container) Holds() []netip.Addr {
	if len(c.Interfaces) == 0 {
		return c.Addresses
	}
	var out []netip.Addr
	for _, i := range c.Interfaces {
		out = append(out, i.Addresses...)
	}
	return out
}

// ContainerInterface is one attached interface of a container.
type ContainerInterface struct {
	Network   string       `json:"network"`
	IfName    string       `json:"ifname"`
	Addresses []netip.Addr `json:"addresses"`
}

// A Volume is a volume that a host's driver has for its containers. The options of its creation are
// left out, because a driver's options may be secrets.
type Volume struct {
	Driver  string    `json:"driver"` // as the runtime's users call it: lariat-nfs
	Name    string    `json:"name"`
	Scope   string    `json:"scope"` // local or global: whether driver and name mean the same data on all hosts
	Host    string    `json:"host"`
	State   string    `json:"state"`
	Users   int       `json:"users"` // number of mounts by that host's containers
	Created time.Time `json:"created,omitzero"`
}

// Validate reports the first mistake in a volume, except in its host, which the service knows.
func (v Volume) Validate() error {
	if err := errors.Join(ValidVolumeName(v.Driver), ValidVolumeName(v.Name)); err != nil {
		return err
	}
	switch {
	case v.Scope != "local" && v.Scope != "global":
		return fmt.Errorf("volume %s: scope %q is neither local nor global", v.Name, v.Scope)
	case ValidName(v.State) != nil:
		return fmt.Errorf("volume %s: state %q is not a word", v.Name, v.State)
	case v.Users < 0:
		return fmt.Errorf("volume %s: %d users", v.Name, v.Users)
	}
	return nil
}

// Allocation is one address in use, as its block's table records it.
type Allocation struct {
	Address     netip.Addr `json:"address"`
	Network     string     `json:"network"`
	ContainerID string     `json:"containerID"`
	IfName      string     `json:"ifname"`
	Host        string     `json:"host"`
	BootID      string     `json:"bootID"`
	StateDir    string     `json:"stateDir"` // directory of the plugin's record: see AttachRequest
	Sequence    uint64     `json:"sequence"` // grows with each use of the block; a release names its own
	Created     time.Time  `json:"created,omitzero"`
}

// Snapshot is the model at one revision. The request may leave out blocks, host routes and
// containers. The network view, from which a host plans, never holds containers.
type Snapshot struct {
	Revision   int64       `json:"revision"`
	Self       string      `json:"self,omitempty"` // name of the host that answered
	Hosts      []Host      `json:"hosts"`
	Networks   []Network   `json:"networks"`
	Blocks     []Block     `json:"blocks"`
	HostRoutes []HostRoute `json:"endpoints,omitempty"`
	Containers []Container `json:"containers,omitempty"`

	// Problems are entries that are left out of the lists above.
	Problems []Problem `json:"problems,omitempty"`

	// Away is the reason why the store does not answer. Then the snapshot is from before. Empty:
	// the store answers.
	Away string `json:"away,omitempty"`

	// Anew is set by a watch: the snapshot was read whole, and the changes since the previous one
	// are not known.
	Anew bool `json:"-"`

	sane bool // set by Sane
}

// Host returns the host of that name.
func (s *Snapshot) Host(name string) (Host, bool) {
	for _, h := range s.Hosts {
		if h.Name == name {
			return h, true
		}
	}
	return Host{}, false
}

// Network returns the network of that name.
func (s *Snapshot) Network(name string) (Network, bool) {
	for _, n := range s.Networks {
		if n.Name == name {
			return n, true
		}
	}
	return Network{}, false
}

// LeadsTo returns a function from an address to the host that its packets go to. That is the host
// of its host route, else the host of its block. The function returns "" for an address without
// either.
func (s *Snapshot) LeadsTo() func(netip.Addr) string {
	single, blocks := make(map[netip.Addr]string, len(s.HostRoutes)), make(map[netip.Prefix]string, len(s.Blocks))
	var lengths []int
	for _, e := range s.HostRoutes {
		single[e.Address] = e.Host
	}
	for _, b := range s.Blocks {
		blocks[b.CIDR] = b.Host
		if !slices.Contains(lengths, b.CIDR.Bits()) {
			lengths = append(lengths, b.CIDR.Bits())
		}
	}
	return func(a netip.Addr) string {
		if h, ok := single[a]; ok {
			return h
		}
		for _, bits := range lengths {
			if p, err := a.Prefix(bits); err == nil && blocks[p] != "" {
				return blocks[p]
			}
		}
		return ""
	}
}

// Holders maps each address to the index of the container that has it. Several objects can name the
// same address: a scheduler's assignment, the remains of a dead host, or a host's mistake. An
// object of the host that the address leads to comes first. So this host's containers alone decide
// the holders of its addresses. Next, an attachment comes before an object without one, then the
// newer object comes first.
func Holders(containers []Container, leadsTo func(netip.Addr) string) map[netip.Addr]int {
	out := map[netip.Addr]int{}
	better := func(a netip.Addr, x, y Container) bool {
		if host := leadsTo(a); x.Host != y.Host && (x.Host == host || y.Host == host) {
			return x.Host == host
		}
		if xs, ys := len(x.Interfaces) > 0, len(y.Interfaces) > 0; xs != ys {
			return xs
		}
		return x.Created.After(y.Created)
	}
	for i, c := range containers {
		for _, a := range c.Holds() {
			if other, ok := out[a]; !ok || better(a, c, containers[other]) {
				out[a] = i
			}
		}
	}
	return out
}

// AllGateways returns the result of Gateways for all hosts and their networks.
func (s *Snapshot) AllGateways() map[string]map[string][]netip.Addr {
	out := map[string]map[string][]netip.Addr{}
	for _, v6 := range []bool{false, true} {
		for _, b := range s.Blocks {
			if !b.Gateway.IsValid() || b.Gateway.Is6() != v6 {
				continue
			}
			if out[b.Host] == nil {
				out[b.Host] = map[string][]netip.Addr{}
			}
			out[b.Host][b.Network] = append(out[b.Host][b.Network], b.Gateway)
		}
	}
	return out
}

// Gateways returns a host's own overlay addresses on a network, IPv4 before IPv6. It scans all
// blocks.
func (s *Snapshot) Gateways(network, host string) []netip.Addr {
	var v4, v6 []netip.Addr
	for _, b := range s.Blocks {
		if b.Network != network || b.Host != host || !b.Gateway.IsValid() {
			continue
		}
		if b.Gateway.Is4() {
			v4 = append(v4, b.Gateway)
		} else {
			v6 = append(v6, b.Gateway)
		}
	}
	return append(v4, v6...)
}

// BlockSize returns the prefix length of the network's blocks in the family of p.
func (n Network) BlockSize(p netip.Prefix) int {
	size, def := n.BlockSizeV4, DefaultBlockSizeV4
	if p.Addr().Is6() {
		size, def = n.BlockSizeV6, DefaultBlockSizeV6
	}
	if size == 0 {
		size = max(def, p.Bits())
	}
	return size
}

// Cooldown returns how long a released address rests before it is used again.
func (n Network) Cooldown() time.Duration {
	if n.CooldownSeconds == 0 {
		return DefaultCooldown
	}
	return time.Duration(n.CooldownSeconds) * time.Second
}

// UDPPort returns the tunnel port, or its default.
func (n Network) UDPPort() uint16 {
	if n.Port == 0 {
		return DefaultPort
	}
	return n.Port
}

// Range is a run of addresses, both ends included.
type Range struct{ First, Last netip.Addr }

// Contains reports whether a lies in the range.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

// ParseRange reads an address, a prefix, or "first-last".
func ParseRange(s string) (Range, error) {
	if first, last, ok := strings.Cut(s, "-"); ok {
		a, err := netip.ParseAddr(strings.TrimSpace(first))
		if err != nil {
			return Range{}, fmt.Errorf("range %q: %w", s, err)
		}
		b, err := netip.ParseAddr(strings.TrimSpace(last))
		if err != nil {
			return Range{}, fmt.Errorf("range %q: %w", s, err)
		}
		if a.BitLen() != b.BitLen() || b.Less(a) {
			return Range{}, fmt.Errorf("range %q: its end lies before its start", s)
		}
		return Range{a, b}, nil
	}
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return Range{}, fmt.Errorf("range %q: %w", s, err)
		}
		return Range{p.Masked().Addr(), LastAddr(p)}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return Range{}, fmt.Errorf("range %q: %w", s, err)
	}
	return Range{a, a}, nil
}

// LastAddr returns the highest address of a prefix.
func LastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Maximum lengths of names, in bytes: of networks and hosts, and of volumes and their drivers.
// Volume names may be as long as the drivers allow.
const (
	MaxNameLength       = 63
	MaxVolumeNameLength = 128
)

// ValidName checks a name that becomes part of keys, paths and interface aliases.
func ValidName(s string) error { return validName(s, MaxNameLength) }

// ValidVolumeName is ValidName for a volume or its driver.
func ValidVolumeName(s string) error { return validName(s, MaxVolumeNameLength) }

func validName(s string, most int) error {
	if s == "" || len(s) > most {
		return fmt.Errorf("name %.100q: want 1 to %d characters", s, most)
	}
	for i, c := range s {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || i > 0 &&
			(c == '-' || c == '_' || c == '.')
		if !ok {
			return fmt.Errorf("name %q: only letters, digits, and (not first) . _ - may stand in it", s)
		}
	}
	return nil
}

// Validate reports every mistake in a network definition, joined.
func (n Network) Validate() error {
	var errs []error
	fail := func(format string, a ...any) {
		errs = append(errs, fmt.Errorf("network %s: "+format, append([]any{n.Name}, a...)...))
	}
	if err := ValidName(n.Name); err != nil {
		errs = append(errs, err)
	}
	if len(n.Subnets) == 0 {
		fail("no subnet given")
	}
	families := map[int]bool{}
	for _, p := range n.Subnets {
		switch size := n.BlockSize(p); {
		case !p.IsValid():
			fail("subnet %s is not a prefix", p)
		case p != p.Masked():
			fail("subnet %s has host bits set, did you mean %s?", p, p.Masked())
		case families[p.Addr().BitLen()]:
			fail("subnet %s is the second of its family; use one wider subnet", p)
		case size < p.Bits() || size > p.Addr().BitLen():
			fail("block size /%d does not fit subnet %s", size, p)
		case p.Addr().BitLen()-size > 16:
			fail("block size /%d: a block holds at most 65536 addresses", size)
		case p.Addr().IsMulticast() || p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast():
			fail("subnet %s is not unicast", p)
		}
		families[p.Addr().BitLen()] = true
	}
	switch n.Encapsulation {
	case EncapVXLAN:
		if n.VNI == 0 || n.VNI >= 1<<24 {
			fail("vni %d: want 1 to 16777215", n.VNI)
		}
	case EncapIPsec:
		if n.DirectRouting {
			fail("directRouting: an encrypted network never sends in clear; remove it, or use the encapsulation %s", EncapVXLAN)
		}
	case EncapNone:
	default:
		fail("encapsulation %q: want %s, %s or %s", n.Encapsulation, EncapVXLAN, EncapIPsec, EncapNone)
	}
	if n.MTU != 0 && (n.MTU < 576 || n.MTU > 65535) {
		fail("mtu %d: want 576 to 65535, or 0 for the underlay's less the overhead", n.MTU)
	} else if n.MTU != 0 && n.MTU < 1280 && families[128] {
		fail("mtu %d: IPv6 needs at least 1280", n.MTU)
	}
	for _, s := range n.Exclude {
		if _, err := ParseRange(s); err != nil {
			fail("exclude: %w", err)
		}
	}
	for _, s := range n.AllowFrom {
		if _, err := netip.ParsePrefix(s); err != nil && ValidName(s) != nil {
			fail("allowFrom %q: want the name of a network, a prefix such as 192.0.2.0/24, or %s", s, AllowAll)
		}
	}
	if n.CooldownSeconds < 0 {
		fail("cooldownSeconds %d is negative", n.CooldownSeconds)
	}
	for _, err := range n.unsafe() {
		fail("%w", err)
	}
	return errors.Join(errs...)
}
