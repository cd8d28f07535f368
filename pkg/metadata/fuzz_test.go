package metadata

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// entries are some of each kind that are in order.
var entries = []struct{ kind, key, value string }{
	{KindHost, "a", `{"name":"a","underlay":[{"address":"192.0.2.1/24","device":"eth0","mtu":1500}],"machineID":"m1","bootID":"b1","mac":"0e:00:c0:00:02:01","ikeKeys":["k1"]}`},
	{KindNetwork, "red", `{"name":"red","subnets":["10.42.0.0/16","fd42::/64"],"encapsulation":"vxlan","vni":1042,"hostNAT":true,"hostNATExempt":["192.168.0.0/16"],"exclude":["10.42.0.1-10.42.0.9"]}`},
	{KindNetwork, "green", `{"name":"green","subnets":["10.43.0.0/16"],"encapsulation":"ipsec","hostNAT":false}`},
	{KindBlock, "red/10.42.0.0/26", `{"network":"red","cidr":"10.42.0.0/26","host":"a","gateway":"10.42.0.1"}`},
	{KindBlock, "red/0.0.0.0/0", `{"network":"red","cidr":"0.0.0.0/0","host":"a"}`},
	{KindHostRoute, "red/10.42.9.9", `{"network":"red","address":"10.42.9.9","host":"a"}`},
	{KindContainer, "a/c1", `{"id":"c1","host":"a","network":"red","addresses":["10.42.0.2"],"interfaces":[{"network":"red","ifname":"eth0","addresses":["10.42.0.2"]}]}`},
	{KindVolume, "a/lariat-nfs/v",
		`{"driver":"lariat-nfs","name":"v","scope":"global","host":"a","state":"ready","users":1}`},
	{KindHost, "a", `{}`}, {KindBlock, "red/10.42.0.0/26", `null`}, {KindNetwork, "red", `{not json`},
}

// decodeAny reads an entry of a kind. ok is false when nobody may use it.
func decodeAny(kind, key string, data []byte) (o any, ok bool) {
	var err error
	switch kind {
	case KindHost:
		o, err = Decode[Host](key, data)
	case KindNetwork:
		o, err = Decode[Network](key, data)
	case KindBlock:
		o, err = Decode[Block](key, data)
	case KindHostRoute:
		o, err = Decode[HostRoute](key, data)
	case KindContainer:
		o, err = Decode[Container](key, data)
	case KindVolume:
		o, err = Decode[Volume](key, data)
	default:
		return nil, false
	}
	return o, err == nil
}

// FuzzEntry: an entry that is used belongs under its key, keeps to the limits, and is the same after it was
// written and read again.
func FuzzEntry(f *testing.F) {
	for _, e := range entries {
		f.Add(e.kind, e.key, []byte(e.value))
	}
	f.Fuzz(func(t *testing.T, kind, key string, data []byte) {
		o, ok := decodeAny(kind, key, data)
		if !ok {
			return
		}
		switch o := o.(type) {
		case Host:
			if o.Name != key || ValidName(key) != nil {
				t.Errorf("%q", key)
			}
			Links([]Host{o})
		case Network:
			if o.Name != key || ValidName(key) != nil {
				t.Errorf("%q", key)
			}
			for _, p := range o.Subnets {
				if p.Bits() < 8 || o.BlockSize(p) < p.Bits() || o.BlockSize(p) > p.Addr().BitLen() {
					t.Errorf("subnet %s, blocks of /%d", p, o.BlockSize(p))
				}
			}
		case Block:
			if BlockKey(o) != key || o.Gateway.IsValid() && !o.CIDR.Contains(o.Gateway) {
				t.Errorf("%q %+v", key, o)
			}
		case HostRoute:
			if HostRouteKey(o) != key {
				t.Errorf("%q %+v", key, o)
			}
		}
		again, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := decodeAny(kind, key, again); !ok {
			t.Errorf("%s is not understood when it is read again: %s", data, again)
		}
	})
}

// FuzzSnapshot: what is sane of a snapshot is sane, and stays so.
func FuzzSnapshot(f *testing.F) {
	f.Add([]byte(`{"revision":3,"self":"a","hosts":[` + entries[0].value + `,{}],"networks":[` + entries[1].value + `,` +
		entries[2].value + `],"blocks":[` + entries[3].value + `,` + entries[4].value + `],"endpoints":[` + entries[5].value +
		`]}`))
	f.Add([]byte(`{"hosts":[null,7,{"name":7}],"blocks":[{"cidr":"10.0.0.0/99"}],"problems":[{"key":"k","what":"w"}]}`))
	f.Add([]byte(`{"networks":[{"name":"b","subnets":["10.0.0.0/8"],"encapsulation":"vxlan","vni":1},{"name":"a","subnets":["10.0.0.0/9"],"encapsulation":"vxlan","vni":2,"created":"2026-01-01T00:00:00Z"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s Snapshot
		if json.Unmarshal(data, &s) != nil {
			return
		}
		first := s.Sane()
		for _, p := range first.Problems {
			if text := p.String() + p.Remedy(); strings.ContainsAny(p.Name(), "\n\x1b") || len(p.Name()) > 4*maxShown+8 ||
				text == "" {
				t.Errorf("%q", text)
			}
		}
		for i, n := range first.Networks {
			for _, o := range first.Networks[:i] {
				if n.Name == o.Name {
					t.Errorf("two networks %s", n.Name)
				}
				for _, p := range n.Subnets {
					if n.Encapsulation != EncapNone && o.Encapsulation != EncapNone && slices.ContainsFunc(o.Subnets, p.Overlaps) {
						t.Errorf("%s of %s overlaps %s", p, n.Name, o.Name)
					}
				}
			}
		}
		for i, b := range first.Blocks {
			n, ok := first.Network(b.Network)
			if !ok || n.Admits(b) != nil {
				t.Errorf("%+v", b)
			}
			for _, o := range first.Blocks[:i] {
				if o.Network == b.Network && o.CIDR.Overlaps(b.CIDR) {
					t.Errorf("%s overlaps %s", b.CIDR, o.CIDR)
				}
			}
		}
		if first.Sane() != first {
			t.Error("it is checked twice")
		}
		plain := *first
		plain.sane = false
		if again := plain.Sane(); len(again.Problems) != len(first.Problems) || len(again.Hosts) != len(first.Hosts) ||
			len(again.Networks) != len(first.Networks) ||
			len(again.Blocks) != len(first.Blocks) || len(again.HostRoutes) != len(first.HostRoutes) ||
			len(again.Containers) != len(first.Containers) {
			t.Errorf("less of it is sane the second time: %v", again.Problems[len(first.Problems):])
		}
	})
}

// FuzzWatch: whatever a watch says, the client neither fails badly nor hands out what nobody can use.
func FuzzWatch(f *testing.F) {
	f.Add([]byte(`{"type":"snapshot","revision":3,"object":{"revision":3,"self":"a","hosts":[` + entries[0].value +
		`],"networks":[` + entries[1].value + `],"blocks":[]}}` + "\n" +
		`{"type":"put","kind":"blocks","key":"red/10.42.0.0/26","revision":4,"object":` + entries[3].value + "}\n" +
		`{"type":"put","kind":"blocks","key":"red/0.0.0.0/0","revision":5,"object":` + entries[4].value + "}\n" +
		`{"type":"put","kind":"hosts","key":"b","revision":5,"object":7}` + "\n" +
		`{"type":"put","kind":"problems","key":"hosts/x","revision":5,"object":"w"}` + "\n" +
		`{"type":"delete","kind":"problems","key":"hosts/x","revision":6}` + "\n" +
		`{"type":"delete","kind":"blocks","key":"red/10.42.0.0/26","revision":7}` + "\n" +
		`{"type":"bookmark","revision":9}` + "\n"))
	f.Add([]byte(`{"type":"put","kind":"hosts","key":"a","revision":1,"object":{}}` + "\n"))
	f.Add([]byte(`{"code":"not-found","message":"no"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var view viewState
		err := follow(bufio.NewReaderSize(bytes.NewReader(data), 4096), &view, func(s *Snapshot) error {
			if !s.sane || view.hosts == nil {
				t.Error("a view that was not checked, or before a first snapshot")
			}
			return nil
		}, func() {})
		if err == nil {
			t.Error("the stream never ends")
		}
	})
}

// TestWatchBeforeSnapshot: a stream that begins in the middle is no view, and a bad object does not end the watch.
func TestWatchBeforeSnapshot(t *testing.T) {
	var view viewState
	run := func(lines ...string) (got *Snapshot, err error) {
		err = follow(bufio.NewReader(strings.NewReader(strings.Join(lines, "\n")+"\n")), &view,
			func(s *Snapshot) error { got = s; return nil }, func() {})
		return got, err
	}
	if s, err := run(`{"type":"put","kind":"hosts","key":"a","revision":1,"object":` + entries[0].value + `}`); s != nil ||
		err == nil || !strings.Contains(err.Error(), "before a first snapshot") {
		t.Errorf("%v %v", s, err)
	}
	s, err := run(`{"type":"snapshot","revision":1,"object":{"hosts":[`+entries[0].value+`,7],"networks":[`+
		entries[1].value+`]}}`,
		`{"type":"put","kind":"blocks","key":"red/10.42.0.0/26","revision":2,"object":`+entries[3].value+`}`,
		`{"type":"put","kind":"blocks","key":"red/0.0.0.0/0","revision":3,"object":`+entries[4].value+`}`,
		`{"type":"put","kind":"blocks","key":"red/10.42.0.0/26","revision":4,"object":{}}`)
	if !errors.Is(err, ErrUnreachable) || len(s.Hosts) != 1 || len(s.Blocks) != 1 || len(s.Problems) != 3 {
		t.Errorf("%+v %v", s, err)
	}
	if s, _ = run(`{"type":"delete","kind":"blocks","key":"red/0.0.0.0/0","revision":5}`,
		`{"type":"delete","kind":"blocks","key":"red/10.42.0.0/26","revision":6}`); len(s.Blocks) != 0 ||
		len(s.Problems) != 1 {
		t.Errorf("%+v", s)
	}
}

// TestEndlessLine: what has no end is given up.
func TestEndlessLine(t *testing.T) {
	if _, err := readLine(bufio.NewReader(strings.NewReader(strings.Repeat("x", 1<<20))), 1<<16); err == nil ||
		len(err.Error()) > 1000 {
		t.Error(err)
	}
}

// BenchmarkSane is what the check of a view of 10 000 hosts costs.
func BenchmarkSane(b *testing.B) {
	s := &Snapshot{Networks: []Network{{Name: "overlay", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		Encapsulation: EncapVXLAN, VNI: 1042}}}
	for i := range 10_000 {
		name := fmt.Sprint("h", i)
		at := netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)})
		s.Hosts = append(s.Hosts, Host{Name: name,
			Underlay: []Underlay{{Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), 12),
				Device: "eth0", MTU: 1500}}})
		s.Blocks = append(s.Blocks, Block{Network: "overlay", CIDR: netip.PrefixFrom(at, 26), Host: name, Gateway: at.Next()})
	}
	b.ReportAllocs()
	for b.Loop() {
		if got := s.Sane(); len(got.Problems) > 0 || len(got.Blocks) != len(s.Blocks) {
			b.Fatal(got.Problems)
		}
	}
}
