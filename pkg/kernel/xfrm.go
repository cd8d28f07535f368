package kernel

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// An SA is a security association of the kernel: one direction of one tunnel (RFC 4301 §4.1).
type SA struct {
	IfID     uint32 // the interface whose policies use the SA
	SPI      uint32
	Src, Dst netip.Addr // of the outer packets

	state netlink.XfrmState
}

// String returns the SA as ip lists it, without its keys.
func (s SA) String() string {
	return fmt.Sprintf("xfrm state src %s dst %s spi %#08x if_id %#x", s.Src, s.Dst, s.SPI, s.IfID)
}

// An XFRMPolicy is a policy of the kernel. It says which packets need an SA, and which SA.
type XFRMPolicy struct {
	IfID     uint32
	Dir      string // in, fwd or out
	Src, Dst netip.Prefix

	policy netlink.XfrmPolicy
}

// String returns the policy as ip lists it.
func (p XFRMPolicy) String() string {
	return fmt.Sprintf("xfrm policy src %s dst %s dir %s if_id %#x", p.Src, p.Dst, p.Dir, p.IfID)
}

// XFRM lists the security associations and policies whose if_id is one of Lariat's.
// It leaves out larval SAs. The kernel uses larval SAs to wait for IKE.
func (n *Netns) XFRM(ctx context.Context, ours func(ifID uint32) bool) ([]SA, []XFRMPolicy, error) {
	h, err := n.xfrmHandle(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer h.Close()
	var sas []SA
	states, err := h.XfrmStateList(netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, nil, fmt.Errorf("list security associations: %w", xfrmMissing(err))
	}
	for _, s := range states {
		if !ours(uint32(s.Ifid)) || s.Spi == 0 || s.Proto != netlink.XFRM_PROTO_ESP {
			continue
		}
		src, _ := netip.AddrFromSlice(s.Src)
		dst, _ := netip.AddrFromSlice(s.Dst)
		sas = append(sas, SA{IfID: uint32(s.Ifid), SPI: uint32(s.Spi), Src: src.Unmap(), Dst: dst.Unmap(), state: s})
	}
	policies, err := n.policies(ours)
	return sas, policies, err
}

// policies replaces XfrmPolicyList of the common library.
// XfrmPolicyList (1.3.1) reads an IPv6 prefix with twelve zero bytes at its end as an IPv4 prefix.
// An example is fd44::/48.
func (n *Netns) policies(ours func(ifID uint32) bool) (list []XFRMPolicy, err error) {
	var s *socket
	if err := n.do(func() (err error) { s, err = openSocket(unix.NETLINK_XFRM); return err }); err != nil {
		return nil, fmt.Errorf("list policies: %w", xfrmMissing(err))
	}
	defer func() { err = errors.Join(err, s.close()) }()
	var bad error
	err = s.dump(nl.XFRM_MSG_GETPOLICY, func(*message) {}, func(typ uint16, body []byte) {
		if typ != nl.XFRM_MSG_NEWPOLICY || len(body) < nl.SizeofXfrmUserpolicyInfo {
			return
		}
		info := nl.DeserializeXfrmUserpolicyInfo(body)
		attrs, err := nl.ParseRouteAttr(body[nl.SizeofXfrmUserpolicyInfo:])
		if err != nil {
			bad = err
			return
		}
		dir := netlink.Dir(info.Dir)
		p := XFRMPolicy{Dir: cmp.Or(directions[dir], dir.String()),
			Src: prefix(info.Sel.Family, info.Sel.Saddr, info.Sel.PrefixlenS),
			Dst: prefix(info.Sel.Family, info.Sel.Daddr, info.Sel.PrefixlenD)}
		for _, a := range attrs {
			if a.Attr.Type == nl.XFRMA_IF_ID && len(a.Value) == 4 {
				p.IfID = binary.NativeEndian.Uint32(a.Value)
			}
		}
		// The kernel identifies a policy by these fields.
		p.policy = netlink.XfrmPolicy{Index: int(info.Index), Dir: dir, Ifid: int(p.IfID)}
		if ours(p.IfID) {
			list = append(list, p)
		}
	})
	if errors.Is(err, errInterrupted) {
		err = nil
	}
	if err = errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("list policies: %w", xfrmMissing(err))
	}
	return list, nil
}

// directions maps directions to the words of ip.
var directions = map[netlink.Dir]string{netlink.XFRM_DIR_IN: "in", netlink.XFRM_DIR_OUT: "out",
	netlink.XFRM_DIR_FWD: "fwd"}

func prefix(family uint16, a nl.XfrmAddress, length uint8) netip.Prefix {
	if family == unix.AF_INET6 {
		return netip.PrefixFrom(netip.AddrFrom16(a), int(length))
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte(a[:4])), int(length))
}

// Flushes calls each when a process removes all SAs or all policies of the namespace at once.
// An example is "ip xfrm policy flush". Foreign SAs and policies count, too.
// Flushes also calls each when it may have missed such a removal. It ends with the context.
func (n *Netns) Flushes(ctx context.Context, each func()) error {
	var f *os.File
	err := n.do(func() (err error) {
		f, err = subscribe(unix.NETLINK_XFRM, nl.XFRMNLGRP_SA, nl.XFRMNLGRP_POLICY)
		return err
	})
	if err != nil {
		return fmt.Errorf("watch for flushes of IPsec: %w", xfrmMissing(err))
	}
	context.AfterFunc(ctx, func() { f.Close() })
	go receive(f, func(typ uint16, _ []byte) {
		if typ == nl.XFRM_MSG_FLUSHSA || typ == nl.XFRM_MSG_FLUSHPOLICY {
			each()
		}
	}, each)
	return nil
}

// RemoveSA removes a security association. A missing one is no error.
func (n *Netns) RemoveSA(ctx context.Context, s SA) error {
	h, err := n.xfrmHandle(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.XfrmStateDel(&s.state); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove %s: %w", s, err)
	}
	return nil
}

// RemovePolicy removes a policy. A missing policy is no error.
func (n *Netns) RemovePolicy(ctx context.Context, p XFRMPolicy) error {
	h, err := n.xfrmHandle(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.XfrmPolicyDel(&p.policy); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove %s: %w", p, err)
	}
	return nil
}

func (n *Netns) xfrmHandle(ctx context.Context) (h *netlink.Handle, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = n.do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_XFRM)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", xfrmMissing(err))
	}
	return h, nil
}

func xfrmMissing(err error) error {
	return named(err, "this kernel lacks IPsec (CONFIG_XFRM_USER, module xfrm_user)", unix.EPROTONOSUPPORT)
}
