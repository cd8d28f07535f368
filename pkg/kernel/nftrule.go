package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	mathbits "math/bits"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

const (
	reg = unix.NFT_REG_1

	verdictDrop, verdictAccept = 0, 1 // include/uapi/linux/netfilter.h

	rtXFRM = 4 // NFT_RT_XFRM (Linux 4.20)
)

// Field offsets in the IP headers.
var addrField = map[bool]map[string]uint32{
	false: {"saddr": 12, "daddr": 16},
	true:  {"saddr": 8, "daddr": 24},
}

// expressions compiles a rule into what nft itself would send, so that "nft list" prints it as delta.Rule.String does.
func expressions(r delta.Rule) (out []expr.Any, comment string, err error) {
	add := func(e ...expr.Any) { out = append(out, e...) }
	cmp := func(not bool, data []byte) {
		op := expr.CmpOpEq
		if not {
			op = expr.CmpOpNeq
		}
		add(&expr.Cmp{Op: op, Register: reg, Data: data})
	}
	var proto byte // of the network layer, once a statement of this rule has matched it
	for _, s := range r {
		switch s := s.(type) {
		case delta.IifPrefix:
			add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg})
			cmp(false, []byte(s)) // compared up to here only
		case delta.IifGroup:
			add(&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: reg})
			cmp(s.Not, binary.NativeEndian.AppendUint32(nil, s.Group))
		case delta.OifGroup:
			add(&expr.Meta{Key: expr.MetaKeyOIFGROUP, Register: reg})
			cmp(s.Not, binary.NativeEndian.AppendUint32(nil, s.Group))
		case delta.InPrefix:
			v6 := s.Prefix.Addr().Is6()
			want := byte(unix.NFPROTO_IPV4)
			if v6 {
				want = unix.NFPROTO_IPV6
			}
			offset, ok := addrField[v6][s.Field]
			if !ok || s.Prefix.Bits() < 1 {
				return nil, "", fmt.Errorf("%s: unknown field %q, or a prefix of everything", s, s.Field)
			}
			if proto != want {
				proto = want
				add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg})
				cmp(false, []byte{want})
			}
			addr := s.Prefix.Masked().Addr().AsSlice()
			whole := s.Prefix.Bits() / 8
			if s.Prefix.Bits()%8 == 0 { // of whole octets no more are loaded than count
				add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(whole)})
				cmp(false, addr[:whole])
				continue
			}
			mask := make([]byte, len(addr))
			for i := range s.Prefix.Bits() {
				mask[i/8] |= 0x80 >> (i % 8)
			}
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(addr))},
				&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(len(addr)), Mask: mask, Xor: make([]byte, len(addr))})
			cmp(false, addr)
		case delta.Iif:
			add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg})
			cmp(s.Not, ifname(s.Name))
		case delta.Oif:
			add(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg})
			cmp(s.Not, ifname(s.Name))
		case delta.InSet:
			want, length := byte(unix.NFPROTO_IPV4), uint32(4)
			if s.V6 {
				want, length = unix.NFPROTO_IPV6, 16
			}
			offset, ok := addrField[s.V6][s.Field]
			if !ok {
				return nil, "", fmt.Errorf("%s: unknown field %q", s, s.Field)
			}
			if proto != want {
				proto = want
				add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg})
				cmp(false, []byte{want})
			}
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
				&expr.Lookup{SourceRegister: reg, SetName: s.Set, Invert: s.Not})
		case delta.UDPDport:
			add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg})
			cmp(false, []byte{unix.IPPROTO_UDP})
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
			cmp(false, binary.BigEndian.AppendUint16(nil, uint16(s)))
		case delta.VXLANVNI:
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 12, Len: 3})
			cmp(false, []byte{byte(s >> 16), byte(s >> 8), byte(s)})
		case delta.NoReverse:
			add(&expr.Fib{Register: reg, ResultOIF: true, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true})
			cmp(false, make([]byte, 4)) // nft compares the whole register
		case delta.NotRouteIPsec:
			add(&expr.Rt{Key: rtXFRM, Register: reg})
			cmp(false, []byte{0})
		case delta.Masquerade:
			add(&expr.Masq{})
		case delta.Verdict:
			kind, ok := map[delta.Verdict]expr.VerdictKind{"accept": expr.VerdictAccept, "drop": expr.VerdictDrop}[s]
			if !ok {
				return nil, "", fmt.Errorf("unknown verdict %q", string(s))
			}
			add(&expr.Verdict{Kind: kind})
		case delta.MarkComment:
			comment = string(s)
		default:
			return nil, "", fmt.Errorf("%s is nothing that can be written", s)
		}
	}
	return out, comment, nil
}

func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func rule(m *message, chain string, r delta.Rule) error {
	exprs, comment, err := expressions(r)
	if err != nil {
		return err
	}
	nftMessage(m, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND)
	m.string(unix.NFTA_RULE_TABLE, delta.Table)
	m.string(unix.NFTA_RULE_CHAIN, chain)
	list := m.nest(unix.NFTA_RULE_EXPRESSIONS)
	for _, e := range exprs {
		b, err := expr.Marshal(nfprotoInet, e)
		if err != nil {
			return err
		}
		m.bytes(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, b)
	}
	m.end(list)
	if comment != "" {
		m.bytes(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, comment))
	}
	return nil
}

// expression is one expression of a rule as the kernel tells it. Whatever attribute it has is kept: an expression with one more
// than expected is another expression.
type expression struct {
	name  string
	attrs map[uint16][]byte
}

func (e expression) u32(attr uint16) uint32 {
	if b := e.attrs[attr]; len(b) == 4 {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// data is the value inside of an attribute of the type nft_data.
func (e expression) data(attr uint16) []byte {
	for a := newAttrs(e.attrs[attr]); a.next(); {
		if a.typ == unix.NFTA_DATA_VALUE {
			return a.value
		}
	}
	return nil
}

func parseRule(body []byte, chains map[string]delta.Chain) {
	var chain string
	var exprs []expression
	var comment string
	for a := newAttrs(body); a.next(); {
		switch a.typ {
		case unix.NFTA_RULE_CHAIN:
			chain = cstring(a.value)
		case unix.NFTA_RULE_USERDATA:
			comment, _ = userdata.GetString(a.value, userdata.TypeComment)
		case unix.NFTA_RULE_EXPRESSIONS:
			for l := newAttrs(a.value); l.next(); {
				e := expression{attrs: map[uint16][]byte{}}
				for x := newAttrs(l.value); x.next(); {
					switch x.typ {
					case unix.NFTA_EXPR_NAME:
						e.name = cstring(x.value)
					case unix.NFTA_EXPR_DATA:
						for y := newAttrs(x.value); y.next(); {
							e.attrs[y.typ] = y.value
						}
					}
				}
				exprs = append(exprs, e)
			}
		}
	}
	c := chains[chain]
	c.Rules = append(c.Rules, statements(exprs, comment))
	chains[chain] = c
}

// statements reads a rule back, expression by expression. It knows what expressions writes and nothing else; the rest becomes
// Unknown, and with it the rule is replaced.
func statements(exprs []expression, comment string) delta.Rule {
	var out delta.Rule
	for len(exprs) > 0 {
		s, n := statement(exprs)
		if s != nil {
			out = append(out, s)
		}
		exprs = exprs[n:]
	}
	if comment != "" {
		out = append(out, delta.MarkComment(comment))
	}
	return out
}

// statement reads the first statement and says of how many expressions it is; nil for a match on the network protocol, which nft
// does not print either.
func statement(x []expression) (delta.Statement, int) {
	first := x[0]
	unknown := delta.Unknown(first.name)
	second := func(name string) (expression, bool) {
		if len(x) < 2 || x[1].name != name {
			return expression{}, false
		}
		return x[1], true
	}
	switch first.name {
	case "meta":
		c, ok := second("cmp")
		if !ok || len(first.attrs) != 2 || first.u32(unix.NFTA_META_DREG) != reg {
			return unknown, 1
		}
		data, not := c.data(unix.NFTA_CMP_DATA), c.u32(unix.NFTA_CMP_OP) == unix.NFT_CMP_NEQ
		if !c.compares() {
			return unknown, 2
		}
		switch key := first.u32(unix.NFTA_META_KEY); {
		case key == unix.NFT_META_IIFNAME && len(data) < unix.IFNAMSIZ && !not:
			return delta.IifPrefix(data), 2
		case key == unix.NFT_META_IIFNAME && len(data) == unix.IFNAMSIZ:
			return delta.Iif{Name: cstring(data), Not: not}, 2
		case key == unix.NFT_META_IIFGROUP && len(data) == 4:
			return delta.IifGroup{Group: binary.NativeEndian.Uint32(data), Not: not}, 2
		case key == unix.NFT_META_OIFGROUP && len(data) == 4:
			return delta.OifGroup{Group: binary.NativeEndian.Uint32(data), Not: not}, 2
		case key == unix.NFT_META_OIFNAME && len(data) == unix.IFNAMSIZ:
			return delta.Oif{Name: cstring(data), Not: not}, 2
		case key == unix.NFT_META_NFPROTO && !not && len(data) == 1 && len(x) > 2 && matchesFamily(x[2:], data[0]):
			return nil, 2
		case key == unix.NFT_META_L4PROTO && !not && bytes.Equal(data, []byte{unix.IPPROTO_UDP}) && len(x) > 3 &&
			x[2].payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2) && x[3].equals(2):
			return delta.UDPDport(binary.BigEndian.Uint16(x[3].data(unix.NFTA_CMP_DATA))), 4
		}
		return unknown, 2
	case "payload":
		if l, ok := second("lookup"); ok && l.u32(unix.NFTA_LOOKUP_SREG) == reg && l.attrs[unix.NFTA_LOOKUP_DREG] == nil {
			for v6, fields := range addrField {
				for field, offset := range fields {
					if first.payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, length(v6)) {
						return delta.InSet{Field: field, Set: cstring(l.attrs[unix.NFTA_LOOKUP_SET]), V6: v6, Not: l.u32(unix.NFTA_LOOKUP_FLAGS)&unix.NFT_LOOKUP_F_INV != 0}, 2
					}
				}
			}
		}
		if p, n, ok := inPrefix(x); ok {
			return p, n
		}
		if c, ok := second("cmp"); ok && c.equals(3) && first.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 12, 3) {
			d := c.data(unix.NFTA_CMP_DATA)
			return delta.VXLANVNI(uint32(d[0])<<16 | uint32(d[1])<<8 | uint32(d[2])), 2
		}
	case "fib":
		flags := uint32(unix.NFTA_FIB_F_SADDR | unix.NFTA_FIB_F_IIF | unix.NFTA_FIB_F_PRESENT)
		if c, ok := second("cmp"); ok && c.equals(4) && binary.NativeEndian.Uint32(c.data(unix.NFTA_CMP_DATA)) == 0 &&
			first.u32(unix.NFTA_FIB_RESULT) == unix.NFT_FIB_RESULT_OIF && first.u32(unix.NFTA_FIB_FLAGS) == flags {
			return delta.NoReverse{}, 2
		}
	case "rt":
		if c, ok := second("cmp"); ok && c.equals(1) && first.u32(unix.NFTA_RT_KEY) == rtXFRM && c.data(unix.NFTA_CMP_DATA)[0] == 0 {
			return delta.NotRouteIPsec{}, 2
		}
	case "masq":
		if first.u32(unix.NFTA_MASQ_FLAGS) == 0 && first.attrs[unix.NFTA_MASQ_REG_PROTO_MIN] == nil {
			return delta.Masquerade{}, 1
		}
	case "immediate":
		if first.u32(unix.NFTA_IMMEDIATE_DREG) == unix.NFT_REG_VERDICT {
			for a := newAttrs(first.attrs[unix.NFTA_IMMEDIATE_DATA]); a.next(); {
				for v := newAttrs(a.value); v.next(); {
					switch {
					case v.typ != unix.NFTA_VERDICT_CODE:
					case v.u32be() == verdictAccept:
						return delta.Verdict("accept"), 1
					case v.u32be() == verdictDrop:
						return delta.Verdict("drop"), 1
					}
				}
			}
		}
	}
	names := make([]string, 0, len(x))
	for _, e := range x {
		names = append(names, e.name)
	}
	return delta.Unknown(strings.Join(slices.Compact(names), " ")), len(x)
}

func length(v6 bool) uint32 {
	if v6 {
		return 16
	}
	return 4
}

// matchesFamily says whether a match on the network protocol is the one that the next statement, on an address, brings along.
func matchesFamily(x []expression, proto byte) bool {
	s, _ := statement(x)
	if p, ok := s.(delta.InPrefix); ok {
		return (proto == unix.NFPROTO_IPV6) == p.Prefix.Addr().Is6() && (proto == unix.NFPROTO_IPV4 || p.Prefix.Addr().Is6())
	}
	in, ok := s.(delta.InSet)
	return ok && (proto == unix.NFPROTO_IPV6) == in.V6 && (proto == unix.NFPROTO_IPV4 || in.V6)
}

// inPrefix reads a match of an address against a prefix: some octets that are equal, or all of them behind a mask.
func inPrefix(x []expression) (p delta.InPrefix, n int, ok bool) {
	for v6, fields := range addrField {
		for field, offset := range fields {
			full := length(v6)
			if len(x) < 2 {
				continue
			}
			if x[1].compares() && x[1].u32(unix.NFTA_CMP_OP) == unix.NFT_CMP_EQ {
				data := x[1].data(unix.NFTA_CMP_DATA)
				if k := len(data); k >= 1 && k <= int(full) && x[0].payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, uint32(k)) {
					addr, _ := netip.AddrFromSlice(append(bytes.Clone(data), make([]byte, int(full)-k)...))
					return delta.InPrefix{Field: field, Prefix: netip.PrefixFrom(addr, 8*k)}, 2, true
				}
			}
			if len(x) < 3 || x[1].name != "bitwise" || !x[2].equals(int(full)) || !x[0].payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, full) ||
				x[1].u32(unix.NFTA_BITWISE_SREG) != reg || x[1].u32(unix.NFTA_BITWISE_DREG) != reg {
				continue
			}
			bits, mask := 0, x[1].data(unix.NFTA_BITWISE_MASK)
			for _, b := range mask {
				bits += mathbits.OnesCount8(b)
			}
			if !bytes.Equal(mask, net.CIDRMask(bits, 8*int(full))) || len(bytes.Trim(x[1].data(unix.NFTA_BITWISE_XOR), "\x00")) > 0 {
				continue
			}
			addr, _ := netip.AddrFromSlice(x[2].data(unix.NFTA_CMP_DATA))
			p = delta.InPrefix{Field: field, Prefix: netip.PrefixFrom(addr, bits)}
			return p, 3, p.Prefix.Masked() == p.Prefix
		}
	}
	return p, 0, false
}

func (e expression) compares() bool {
	op := e.u32(unix.NFTA_CMP_OP)
	return e.name == "cmp" && e.u32(unix.NFTA_CMP_SREG) == reg && (op == unix.NFT_CMP_EQ || op == unix.NFT_CMP_NEQ)
}

// equals says whether this compares register 1 for equality with n octets.
func (e expression) equals(n int) bool {
	return e.compares() && e.u32(unix.NFTA_CMP_OP) == unix.NFT_CMP_EQ && len(e.data(unix.NFTA_CMP_DATA)) == n
}

func (e expression) payload(base, offset, length uint32) bool {
	return e.name == "payload" && e.attrs[unix.NFTA_PAYLOAD_SREG] == nil && e.u32(unix.NFTA_PAYLOAD_DREG) == reg &&
		e.u32(unix.NFTA_PAYLOAD_BASE) == base && e.u32(unix.NFTA_PAYLOAD_OFFSET) == offset && e.u32(unix.NFTA_PAYLOAD_LEN) == length
}
