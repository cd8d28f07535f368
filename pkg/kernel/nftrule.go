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

	// Bits of include/uapi/linux/netfilter/nf_conntrack_common.h.
	// ctReply has the states established and related. ctDNAT is the status IPS_DST_NAT.
	ctReply = 1<<1 | 1<<2
	ctDNAT  = 1 << 5

	fragmentHeader = 44 // IANA's number of the IPv6 fragment header
	fragmentOffset = 6  // offset of the field in the IPv4 header
)

// fragmentMask selects the more-fragments flag and the fragment offset (RFC 791 §3.1).
var fragmentMask = []byte{0x3f, 0xff}

// addrField maps fields to their offsets in the IPv4 header (false) and the IPv6 header (true).
var addrField = map[bool]map[string]uint32{
	false: {"saddr": 12, "daddr": 16},
	true:  {"saddr": 8, "daddr": 24},
}

// expressions compiles a rule into the expressions that nft would send.
// Therefore "nft list" prints the rule as delta.Rule.String does.
func expressions(r delta.Rule) (out []expr.Any, comment string, err error) {
	add := func(e ...expr.Any) { out = append(out, e...) }
	cmp := func(not bool, data []byte) {
		op := expr.CmpOpEq
		if not {
			op = expr.CmpOpNeq
		}
		add(&expr.Cmp{Op: op, Register: reg, Data: data})
	}
	var proto byte // the network protocol that an earlier statement of this rule has matched
	ofFamily := func(v6 bool) {
		want := byte(unix.NFPROTO_IPV4)
		if v6 {
			want = unix.NFPROTO_IPV6
		}
		if proto != want {
			proto = want
			add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg})
			cmp(false, []byte{want})
		}
	}
	l4 := func(number byte) {
		add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg})
		cmp(false, []byte{number})
	}
	udp := func(offset uint32, port uint16) {
		l4(unix.IPPROTO_UDP)
		add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2})
		cmp(false, binary.BigEndian.AppendUint16(nil, port))
	}
	bit := func(key expr.CtKey, mask uint32) {
		add(&expr.Ct{Key: key, Register: reg},
			&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, mask),
				Xor: make([]byte, 4)})
		cmp(true, make([]byte, 4))
	}
	for _, s := range r {
		switch s := s.(type) {
		case delta.IifPrefix:
			add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg})
			cmp(false, []byte(s)) // compares the prefix only
		case delta.NotIifPrefix:
			add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg})
			cmp(true, []byte(s))
		case delta.IifGroup:
			add(&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: reg})
			cmp(s.Not, binary.NativeEndian.AppendUint32(nil, s.Group))
		case delta.OifGroup:
			add(&expr.Meta{Key: expr.MetaKeyOIFGROUP, Register: reg})
			cmp(s.Not, binary.NativeEndian.AppendUint32(nil, s.Group))
		case delta.InPrefix:
			v6 := s.Prefix.Addr().Is6()
			offset, ok := addrField[v6][s.Field]
			if !ok || s.Prefix.Bits() < 1 {
				return nil, "", fmt.Errorf("%s: unknown field %q, or a prefix of everything", s, s.Field)
			}
			ofFamily(v6)
			addr := s.Prefix.Masked().Addr().AsSlice()
			whole := s.Prefix.Bits() / 8
			if s.Prefix.Bits()%8 == 0 { // load only the bytes of the prefix
				add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(whole)})
				cmp(false, addr[:whole])
				continue
			}
			mask := make([]byte, len(addr))
			for i := range s.Prefix.Bits() {
				mask[i/8] |= 0x80 >> (i % 8)
			}
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(addr))},
				&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(len(addr)), Mask: mask,
					Xor: make([]byte, len(addr))})
			cmp(false, addr)
		case delta.Iif:
			add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg})
			cmp(s.Not, ifname(s.Name))
		case delta.Oif:
			add(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg})
			cmp(s.Not, ifname(s.Name))
		case delta.InSet:
			offset, ok := addrField[s.V6][s.Field]
			if !ok {
				return nil, "", fmt.Errorf("%s: unknown field %q", s, s.Field)
			}
			ofFamily(s.V6)
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length(s.V6)},
				&expr.Lookup{SourceRegister: reg, SetName: s.Set, Invert: s.Not})
		case delta.NotAddr:
			v6 := s.Addr.Is6()
			offset, ok := addrField[v6][s.Field]
			if !ok {
				return nil, "", fmt.Errorf("%s: unknown field %q", s, s.Field)
			}
			ofFamily(v6)
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length(v6)})
			cmp(true, s.Addr.AsSlice())
		case delta.L4Proto:
			l4(byte(s))
		case delta.UDPDport:
			udp(2, uint16(s))
		case delta.DportIn:
			l4(byte(s.Proto))
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
				&expr.Lookup{SourceRegister: reg, SetName: s.Set})
		case delta.UDPSport:
			udp(0, uint16(s))
		case delta.Fragment:
			ofFamily(s.V6)
			if !s.V6 {
				add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: fragmentOffset, Len: 2},
					&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 2, Mask: fragmentMask, Xor: make([]byte, 2)})
				cmp(true, make([]byte, 2))
				continue
			}
			add(&expr.Exthdr{DestRegister: reg, Type: fragmentHeader, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT,
				Op: expr.ExthdrOpIpv6})
			cmp(false, []byte{1})
		case delta.Reverse:
			add(&expr.Fib{Register: reg, ResultOIF: true, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true})
			cmp(false, binary.NativeEndian.AppendUint32(nil, 1)) // as nft does
		case delta.ToLocal:
			add(&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true})
			cmp(false, binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL))
		case delta.CtReply:
			bit(expr.CtKeySTATE, ctReply)
		case delta.CtDNAT:
			bit(expr.CtKeySTATUS, ctDNAT)
		case delta.Notrack:
			add(&expr.Notrack{})
		case delta.TooBig:
			add(tooBig(s)...)
		case delta.VXLANVNI:
			add(&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 12, Len: 3})
			cmp(false, []byte{byte(s >> 16), byte(s >> 8), byte(s)})
		case delta.NoReverse:
			if s.V6 {
				ofFamily(true)
			}
			add(&expr.Fib{Register: reg, ResultOIF: true, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true})
			cmp(false, make([]byte, 4)) // nft compares the whole register
		case delta.NotRouteIPsec:
			add(&expr.Rt{Key: rtXFRM, Register: reg})
			cmp(false, []byte{0})
		case delta.Masquerade:
			if s == (delta.Masquerade{}) {
				add(&expr.Masq{})
				continue
			}
			add(&expr.Immediate{Register: unix.NFT_REG_1, Data: binary.BigEndian.AppendUint16(nil, s.First)},
				&expr.Immediate{Register: unix.NFT_REG_2, Data: binary.BigEndian.AppendUint16(nil, s.Last)},
				&expr.Masq{ToPorts: true, RegProtoMin: unix.NFT_REG_1, RegProtoMax: unix.NFT_REG_2})
		case delta.Verdict:
			chain := s.JumpTo()
			switch {
			case s == "accept":
				add(&expr.Verdict{Kind: expr.VerdictAccept})
			case s == "drop":
				add(&expr.Verdict{Kind: expr.VerdictDrop})
			case chain != "":
				add(&expr.Verdict{Kind: expr.VerdictJump, Chain: chain})
			default:
				return nil, "", fmt.Errorf("unknown verdict %q", string(s))
			}
		case delta.MarkComment:
			comment = string(s)
		default:
			return nil, "", fmt.Errorf("%s is nothing that can be written", s)
		}
	}
	return out, comment, nil
}

// tooBig returns all expressions of delta.TooBig. readTooBig compares a rule with them.
func tooBig(s delta.TooBig) []expr.Any {
	load := func(offset, length uint32) expr.Any {
		return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length}
	}
	compare := func(op expr.CmpOp, data ...byte) expr.Any { return &expr.Cmp{Op: op, Register: reg, Data: data} }
	is := func(what expr.Any, data ...byte) []expr.Any { return []expr.Any{what, compare(expr.CmpOpEq, data...)} }
	const inner = 8 // offset of the packet inside the ICMP error
	l4proto := &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}
	v6, below := s.From.Is6(), binary.BigEndian.AppendUint32(nil, uint32(s.Below))
	var out []expr.Any
	if v6 {
		out = slices.Concat(is(l4proto, unix.IPPROTO_ICMPV6), is(load(0, 1), 2),
			[]expr.Any{load(4, 4), compare(expr.CmpOpLt, below...), load(inner+6, 1), compare(expr.CmpOpNeq, unix.IPPROTO_TCP)})
	} else {
		out = slices.Concat(is(l4proto, unix.IPPROTO_ICMP), is(load(0, 1), 3), is(load(1, 1), 4),
			[]expr.Any{load(6, 2), compare(expr.CmpOpLt, below[2:]...), load(inner+9, 1),
				compare(expr.CmpOpNeq, unix.IPPROTO_TCP)})
	}
	return slices.Concat(out, is(load(inner+addrField[v6]["saddr"], length(v6)), s.From.AsSlice()...),
		[]expr.Any{load(inner+addrField[v6]["daddr"], length(v6)), &expr.Lookup{SourceRegister: reg, SetName: s.To}})
}

// readTooBig parses the expressions of tooBig.
// It extracts the variable parts, and compares all expressions with those of tooBig.
func readTooBig(x []expression) (s delta.TooBig, n int, ok bool) {
	n = slices.IndexFunc(x, func(e expression) bool { return e.name == "lookup" }) + 1
	if n < 8 {
		return s, 0, false
	}
	from, isAddr := netip.AddrFromSlice(x[n-3].data(unix.NFTA_CMP_DATA))
	below := x[n-7].data(unix.NFTA_CMP_DATA)
	if !isAddr || len(below) < 2 {
		return s, 0, false
	}
	s = delta.TooBig{From: from, To: cstring(x[n-1].attrs[unix.NFTA_LOOKUP_SET]),
		Below: binary.BigEndian.Uint16(below[len(below)-2:])}
	all := tooBig(s)
	if len(all) != n {
		return s, 0, false
	}
	for i, want := range all {
		var same bool
		switch e := want.(type) {
		case *expr.Meta:
			same = x[i].name == "meta" && x[i].u32(unix.NFTA_META_DREG) == reg && x[i].u32(unix.NFTA_META_KEY) == uint32(e.Key)
		case *expr.Payload:
			same = x[i].payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, e.Offset, e.Len)
		case *expr.Cmp:
			same = x[i].name == "cmp" && x[i].u32(unix.NFTA_CMP_SREG) == reg && x[i].u32(unix.NFTA_CMP_OP) == uint32(e.Op) &&
				bytes.Equal(x[i].data(unix.NFTA_CMP_DATA), e.Data)
		case *expr.Lookup:
			same = x[i].plainLookup()
		}
		if !same {
			return s, 0, false
		}
	}
	return s, n, true
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
		if masq, ok := e.(*expr.Masq); ok && masq.ToPorts {
			masqueradePorts(m, masq)
			continue
		}
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

// masqueradePorts writes a masquerade with the flag that the library (0.3.0) leaves out.
// Without the flag the kernel ignores the ports.
func masqueradePorts(m *message, masq *expr.Masq) {
	elem := m.nest(unix.NFTA_LIST_ELEM)
	m.string(unix.NFTA_EXPR_NAME, "masq")
	data := m.nest(unix.NFTA_EXPR_DATA)
	m.u32be(unix.NFTA_MASQ_FLAGS, unix.NF_NAT_RANGE_PROTO_SPECIFIED)
	m.u32be(unix.NFTA_MASQ_REG_PROTO_MIN, masq.RegProtoMin)
	m.u32be(unix.NFTA_MASQ_REG_PROTO_MAX, masq.RegProtoMax)
	m.end(data)
	m.end(elem)
}

// An expression is one expression of a rule as the kernel lists it.
// It keeps all attributes, because an additional attribute makes another expression.
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

// data returns the value in an attribute of the type nft_data.
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

// statements parses a rule, expression by expression. It knows only the output of expressions.
// All other expressions become Unknown, so the rule is replaced.
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

// statement returns the first statement and the number of its expressions.
// The statement is nil for a match on the network protocol, because nft does not print that match.
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
		case key == unix.NFT_META_IIFNAME && len(data) < unix.IFNAMSIZ:
			return delta.NotIifPrefix(data), 2
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
		case key == unix.NFT_META_NFPROTO && !not && bytes.Equal(data, []byte{unix.NFPROTO_IPV6}) && len(x) > 2:
			if s, n := statement(x[2:]); s == (delta.NoReverse{}) {
				return delta.NoReverse{V6: true}, 2 + n
			}
		case key == unix.NFT_META_L4PROTO && !not && len(data) == 1:
			if data[0] == unix.IPPROTO_UDP && len(x) > 3 && x[3].equals(2) {
				port := binary.BigEndian.Uint16(x[3].data(unix.NFTA_CMP_DATA))
				switch {
				case x[2].payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2):
					return delta.UDPSport(port), 4
				case x[2].payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2):
					return delta.UDPDport(port), 4
				}
			}
			if len(x) > 3 && x[2].payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2) && x[3].plainLookup() {
				return delta.DportIn{Proto: delta.L4Proto(data[0]), Set: cstring(x[3].attrs[unix.NFTA_LOOKUP_SET])}, 4
			}
			if s, n, ok := readTooBig(x); ok {
				return s, n
			}
			return delta.L4Proto(data[0]), 2
		}
		return unknown, 2
	case "payload":
		if l, ok := second("lookup"); ok && l.u32(unix.NFTA_LOOKUP_SREG) == reg && l.attrs[unix.NFTA_LOOKUP_DREG] == nil {
			for v6, fields := range addrField {
				for field, offset := range fields {
					if first.payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, length(v6)) {
						return delta.InSet{Field: field, Set: cstring(l.attrs[unix.NFTA_LOOKUP_SET]), V6: v6,
							Not: l.u32(unix.NFTA_LOOKUP_FLAGS)&unix.NFT_LOOKUP_F_INV != 0}, 2
					}
				}
			}
		}
		if p, n, ok := inPrefix(x); ok {
			return p, n
		}
		if a, ok := notAddr(x); ok {
			return a, 2
		}
		if first.payload(unix.NFT_PAYLOAD_NETWORK_HEADER, fragmentOffset, 2) {
			if mask, ok := anyBit(x); ok && bytes.Equal(mask, fragmentMask) {
				return delta.Fragment{}, 3
			}
		}
		if c, ok := second("cmp"); ok && c.equals(3) && first.payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 12, 3) {
			d := c.data(unix.NFTA_CMP_DATA)
			return delta.VXLANVNI(uint32(d[0])<<16 | uint32(d[1])<<8 | uint32(d[2])), 2
		}
	case "fib":
		flags := uint32(unix.NFTA_FIB_F_SADDR | unix.NFTA_FIB_F_IIF | unix.NFTA_FIB_F_PRESENT)
		c, ok := second("cmp")
		if !ok || first.u32(unix.NFTA_FIB_DREG) != reg {
			break
		}
		data, result := c.data(unix.NFTA_CMP_DATA), first.u32(unix.NFTA_FIB_RESULT)
		switch {
		case result == unix.NFT_FIB_RESULT_OIF && first.u32(unix.NFTA_FIB_FLAGS) == flags:
			switch {
			case c.equals(4) && binary.NativeEndian.Uint32(data) == 0:
				return delta.NoReverse{}, 2
			case c.equals(4) && binary.NativeEndian.Uint32(data) == 1:
				return delta.Reverse{}, 2
			}
		case result == unix.NFT_FIB_RESULT_ADDRTYPE && first.u32(unix.NFTA_FIB_FLAGS) == unix.NFTA_FIB_F_DADDR &&
			c.equals(4) && binary.NativeEndian.Uint32(data) == unix.RTN_LOCAL:
			return delta.ToLocal{}, 2
		}
	case "ct":
		mask, ok := anyBit(x)
		switch key := first.u32(unix.NFTA_CT_KEY); {
		case !ok || first.u32(unix.NFTA_CT_DREG) != reg || first.attrs[unix.NFTA_CT_DIRECTION] != nil:
		case len(mask) != 4:
		case key == unix.NFT_CT_STATE && binary.NativeEndian.Uint32(mask) == ctReply:
			return delta.CtReply{}, 3
		case key == unix.NFT_CT_STATUS && binary.NativeEndian.Uint32(mask) == ctDNAT:
			return delta.CtDNAT{}, 3
		}
	case "exthdr":
		if c, ok := second("cmp"); ok && c.equals(1) && c.data(unix.NFTA_CMP_DATA)[0] == 1 &&
			first.u32(unix.NFTA_EXTHDR_DREG) == reg &&
			bytes.Equal(first.attrs[unix.NFTA_EXTHDR_TYPE], []byte{fragmentHeader}) &&
			first.u32(unix.NFTA_EXTHDR_OP) == unix.NFT_EXTHDR_OP_IPV6 &&
			first.u32(unix.NFTA_EXTHDR_FLAGS) == unix.NFT_EXTHDR_F_PRESENT && first.u32(unix.NFTA_EXTHDR_OFFSET) == 0 {
			return delta.Fragment{V6: true}, 2
		}
	case "notrack":
		return delta.Notrack{}, 1
	case "rt":
		if c, ok := second("cmp"); ok && c.equals(1) && first.u32(unix.NFTA_RT_KEY) == rtXFRM &&
			c.data(unix.NFTA_CMP_DATA)[0] == 0 {
			return delta.NotRouteIPsec{}, 2
		}
	case "masq":
		if first.u32(unix.NFTA_MASQ_FLAGS) == 0 && first.attrs[unix.NFTA_MASQ_REG_PROTO_MIN] == nil {
			return delta.Masquerade{}, 1
		}
	case "immediate":
		if first.u32(unix.NFTA_IMMEDIATE_DREG) == unix.NFT_REG_VERDICT {
			if v, ok := verdict(first); ok {
				return v, 1
			}
		} else if m, ok := masqueradeTo(x); ok {
			return m, 3
		}
	}
	names := make([]string, 0, len(x))
	for _, e := range x {
		names = append(names, e.name)
	}
	return delta.Unknown(strings.Join(slices.Compact(names), " ")), len(x)
}

func verdict(e expression) (delta.Verdict, bool) {
	var code int32
	var chain string
	found := false
	for a := newAttrs(e.attrs[unix.NFTA_IMMEDIATE_DATA]); a.next(); {
		for v := newAttrs(a.value); v.next(); {
			switch v.typ {
			case unix.NFTA_VERDICT_CODE:
				code, found = int32(v.u32be()), true
			case unix.NFTA_VERDICT_CHAIN:
				chain = cstring(v.value)
			}
		}
	}
	switch {
	case !found:
	case code == verdictAccept:
		return "accept", true
	case code == verdictDrop:
		return "drop", true
	case code == unix.NFT_JUMP && chain != "":
		return delta.Jump(chain), true
	}
	return "", false
}

// masqueradeTo parses two ports and the masquerade that uses them.
func masqueradeTo(x []expression) (delta.Masquerade, bool) {
	if len(x) < 3 || x[1].name != "immediate" || x[2].name != "masq" ||
		x[2].u32(unix.NFTA_MASQ_FLAGS) != unix.NF_NAT_RANGE_PROTO_SPECIFIED {
		return delta.Masquerade{}, false
	}
	var ports [2]uint16
	for i, attr := range []uint16{unix.NFTA_MASQ_REG_PROTO_MIN, unix.NFTA_MASQ_REG_PROTO_MAX} {
		data := x[i].data(unix.NFTA_IMMEDIATE_DATA)
		if len(data) != 2 || x[i].u32(unix.NFTA_IMMEDIATE_DREG) != x[2].u32(attr) {
			return delta.Masquerade{}, false
		}
		ports[i] = binary.BigEndian.Uint16(data)
	}
	return delta.Masquerade{First: ports[0], Last: ports[1]}, ports != [2]uint16{}
}

// anyBit parses the comparison after the first expression. That comparison matches when any bit of
// the mask is set.
func anyBit(x []expression) (mask []byte, ok bool) {
	if len(x) < 3 || x[1].name != "bitwise" || x[1].u32(unix.NFTA_BITWISE_SREG) != reg ||
		x[1].u32(unix.NFTA_BITWISE_DREG) != reg ||
		!x[2].compares() || x[2].u32(unix.NFTA_CMP_OP) != unix.NFT_CMP_NEQ ||
		len(bytes.Trim(x[1].data(unix.NFTA_BITWISE_XOR), "\x00")) > 0 {
		return nil, false
	}
	mask = x[1].data(unix.NFTA_BITWISE_MASK)
	return mask, bytes.Equal(x[2].data(unix.NFTA_CMP_DATA), make([]byte, len(mask)))
}

// notAddr parses a match of an address that differs from a given one.
func notAddr(x []expression) (delta.NotAddr, bool) {
	if len(x) < 2 || !x[1].compares() || x[1].u32(unix.NFTA_CMP_OP) != unix.NFT_CMP_NEQ {
		return delta.NotAddr{}, false
	}
	addr, ok := netip.AddrFromSlice(x[1].data(unix.NFTA_CMP_DATA))
	if !ok {
		return delta.NotAddr{}, false
	}
	for field, offset := range addrField[addr.Is6()] {
		if x[0].payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, length(addr.Is6())) {
			return delta.NotAddr{Field: field, Addr: addr}, true
		}
	}
	return delta.NotAddr{}, false
}

func length(v6 bool) uint32 {
	if v6 {
		return 16
	}
	return 4
}

// matchesFamily reports whether a match on the network protocol belongs to the next statement.
// The statements on addresses and fragments need such a match.
func matchesFamily(x []expression, proto byte) bool {
	var v6 bool
	switch s, _ := statement(x); s := s.(type) {
	case delta.InPrefix:
		v6 = s.Prefix.Addr().Is6()
	case delta.NotAddr:
		v6 = s.Addr.Is6()
	case delta.InSet:
		v6 = s.V6
	case delta.Fragment:
		v6 = s.V6
	default:
		return false
	}
	return v6 && proto == unix.NFPROTO_IPV6 || !v6 && proto == unix.NFPROTO_IPV4
}

// inPrefix parses a match of an address against a prefix.
// The match compares the first bytes, or all bytes behind a mask.
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
			if len(x) < 3 || x[1].name != "bitwise" || !x[2].equals(int(full)) || !x[0].payload(unix.NFT_PAYLOAD_NETWORK_HEADER,
				offset, full) ||
				x[1].u32(unix.NFTA_BITWISE_SREG) != reg || x[1].u32(unix.NFTA_BITWISE_DREG) != reg {
				continue
			}
			bits, mask := 0, x[1].data(unix.NFTA_BITWISE_MASK)
			for _, b := range mask {
				bits += mathbits.OnesCount8(b)
			}
			if !bytes.Equal(mask, net.CIDRMask(bits, 8*int(full))) ||
				len(bytes.Trim(x[1].data(unix.NFTA_BITWISE_XOR), "\x00")) > 0 {
				continue
			}
			addr, _ := netip.AddrFromSlice(x[2].data(unix.NFTA_CMP_DATA))
			p = delta.InPrefix{Field: field, Prefix: netip.PrefixFrom(addr, bits)}
			return p, 3, p.Prefix.Masked() == p.Prefix
		}
	}
	return p, 0, false
}

// plainLookup reports whether the expression tests that register 1 is in a set.
func (e expression) plainLookup() bool {
	return e.name == "lookup" && e.u32(unix.NFTA_LOOKUP_SREG) == reg && e.attrs[unix.NFTA_LOOKUP_DREG] == nil &&
		e.u32(unix.NFTA_LOOKUP_FLAGS) == 0
}

func (e expression) compares() bool {
	op := e.u32(unix.NFTA_CMP_OP)
	return e.name == "cmp" && e.u32(unix.NFTA_CMP_SREG) == reg && (op == unix.NFT_CMP_EQ || op == unix.NFT_CMP_NEQ)
}

// equals reports whether the expression compares register 1 for equality with n bytes.
func (e expression) equals(n int) bool {
	return e.compares() && e.u32(unix.NFTA_CMP_OP) == unix.NFT_CMP_EQ && len(e.data(unix.NFTA_CMP_DATA)) == n
}

func (e expression) payload(base, offset, length uint32) bool {
	return e.name == "payload" && e.attrs[unix.NFTA_PAYLOAD_SREG] == nil && e.u32(unix.NFTA_PAYLOAD_DREG) == reg &&
		e.u32(unix.NFTA_PAYLOAD_BASE) == base && e.u32(unix.NFTA_PAYLOAD_OFFSET) == offset &&
		e.u32(unix.NFTA_PAYLOAD_LEN) == length
}
