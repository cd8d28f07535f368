package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SA is a security association of the kernel's: one direction of one tunnel (RFC 4301 §4.1).
type SA struct {
	IfID     uint32 // whose policies use it
	SPI      uint32
	Src, Dst netip.Addr // of the outer packets

	state netlink.XfrmState
}

// String is the SA as ip lists it, without its keys.
func (s SA) String() string {
	return fmt.Sprintf("xfrm state src %s dst %s spi %#08x if_id %#x", s.Src, s.Dst, s.SPI, s.IfID)
}

// XFRMPolicy is a policy of the kernel's: which packets need an SA, and which.
type XFRMPolicy struct {
	IfID     uint32
	Dir      string // in, fwd or out
	Src, Dst netip.Prefix

	policy netlink.XfrmPolicy
}

// String is the policy as ip lists it.
func (p XFRMPolicy) String() string {
	return fmt.Sprintf("xfrm policy src %s dst %s dir %s if_id %#x", p.Src, p.Dst, p.Dir, p.IfID)
}

// XFRM lists the security associations and policies whose if_id is one of ours. Larval SAs, with which the kernel waits for IKE,
// are left out.
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
	var policies []XFRMPolicy
	list, err := h.XfrmPolicyList(netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, nil, fmt.Errorf("list policies: %w", xfrmMissing(err))
	}
	for _, p := range list {
		if !ours(uint32(p.Ifid)) {
			continue
		}
		x := XFRMPolicy{IfID: uint32(p.Ifid), Dir: p.Dir.String(), policy: p}
		if p.Dir == netlink.XFRM_DIR_IN || p.Dir == netlink.XFRM_DIR_OUT || p.Dir == netlink.XFRM_DIR_FWD {
			x.Dir = map[netlink.Dir]string{netlink.XFRM_DIR_IN: "in", netlink.XFRM_DIR_OUT: "out", netlink.XFRM_DIR_FWD: "fwd"}[p.Dir]
		}
		if p.Src != nil {
			x.Src, _ = netip.ParsePrefix(p.Src.String())
		}
		if p.Dst != nil {
			x.Dst, _ = netip.ParsePrefix(p.Dst.String())
		}
		policies = append(policies, x)
	}
	return sas, policies, nil
}

// RemoveSA removes a security association. It is no error when it is gone.
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

// RemovePolicy removes a policy. It is no error when it is gone.
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
