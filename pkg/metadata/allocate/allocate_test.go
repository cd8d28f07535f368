package allocate

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }

func entry(a netip.Addr, id string, seq uint64) Entry {
	return Entry{Address: a, ID: metadata.AttachmentID{ContainerID: id, IfName: "eth0"},
		Owner: Owner{Host: "a", BootID: "boot"}, Sequence: seq, Created: start}
}

func TestEdgesOfSubnets(t *testing.T) {
	for _, tc := range []struct {
		subnet, address string
		edge            bool
	}{
		{"10.42.0.0/16", "10.42.0.0", true},
		{"10.42.0.0/16", "10.42.255.255", true},
		{"10.42.0.0/16", "10.42.0.63", false}, // the last of a block is an address like any other
		{"10.42.0.0/16", "10.42.0.64", false},
		{"10.42.0.0/31", "10.42.0.0", false},
		{"10.42.0.0/32", "10.42.0.0", false},
		{"fd42::/64", "fd42::", true},
		{"fd42::/64", "fd42::ffff:ffff:ffff:ffff", false},
		{"fd42::/127", "fd42::", false},
	} {
		if got := Edge(prefix(tc.subnet), addr(tc.address)); got != tc.edge {
			t.Errorf("%s of %s: %t", tc.address, tc.subnet, got)
		}
	}
}

func TestTablesCoverBlocks(t *testing.T) {
	for _, tc := range []struct {
		block string
		n     int
	}{{"10.42.0.64/26", 1}, {"10.42.0.0/24", 4}, {"10.42.0.0/30", 1}, {"10.42.0.5/32", 1}, {"fd42::40/122", 1},
		{"fd42::/112", 1024}, {"255.255.255.192/26", 1}, {"255.255.0.0/16", 1024}} {
		tables := TablesOf(prefix(tc.block))
		if len(tables) != tc.n {
			t.Errorf("%s: %d tables, want %d", tc.block, len(tables), tc.n)
		}
		for _, p := range tables {
			if !prefix(tc.block).Contains(p.Addr()) || TableOf(prefix(tc.block), metadata.LastAddr(p)) != p {
				t.Errorf("%s: table %s", tc.block, p)
			}
		}
	}
}

func TestFreshFirstThenLongestRested(t *testing.T) {
	tb := &Table{CIDR: prefix("10.0.0.0/30")}
	rules := Rules{Subnet: prefix("10.0.0.0/16"),
		Exclude: []metadata.Range{{First: addr("10.0.0.1"), Last: addr("10.0.0.1")}}}
	a, _ := tb.Fresh(rules.Usable)
	if a != addr("10.0.0.2") {
		t.Fatalf("%s: the subnet's first and the excluded one are skipped", a)
	}
	tb.Take(entry(a, "x", 1))
	tb.Release(start, func(Entry) bool { return true })
	if b, _ := tb.Fresh(rules.Usable); b != addr("10.0.0.3") {
		t.Fatalf("%s: a released address is not fresh", b)
	}
	tb.Take(entry(addr("10.0.0.3"), "y", 2))
	tb.Release(start.Add(time.Second), func(Entry) bool { return true })
	if _, ok := tb.Fresh(rules.Usable); ok {
		t.Fatal("nothing is fresh any more")
	}
	if _, ok := tb.Rested(start.Add(-time.Second), rules.Usable); ok {
		t.Fatal("nothing has rested yet")
	}
	r, ok := tb.Rested(start.Add(time.Minute), rules.Usable)
	if !ok || r.Address != addr("10.0.0.2") {
		t.Fatalf("%v: the one released first comes first", r)
	}
	if u := tb.Usage(rules.Usable); u.Used != 0 || u.Fresh != 0 || u.Resting != 2 {
		t.Errorf("%+v", u)
	}
}

func TestFreeBlocks(t *testing.T) {
	claimed := map[netip.Prefix]bool{}
	is := func(p netip.Prefix) bool { return claimed[p] }
	r := Rules{Subnet: prefix("10.0.0.0/24")}
	first := func(r Rules) netip.Addr { return Place(r.Subnet, 26, 0) }
	for i := range 4 {
		p, ok := r.FreeBlock(26, first(r), is)
		if !ok || p.Addr() != netip.AddrFrom4([4]byte{10, 0, 0, byte(i * 64)}) {
			t.Fatalf("%d: %s %t", i, p, ok)
		}
		claimed[p] = true
	}
	if p, ok := r.FreeBlock(26, first(r), is); ok {
		t.Fatalf("a fifth block %s of four", p)
	}
	clear(claimed)
	for _, want := range []string{"10.0.0.128/26", "10.0.0.192/26", "10.0.0.0/26", "10.0.0.64/26"} {
		p, ok := r.FreeBlock(26, Place(r.Subnet, 26, 2), is)
		if !ok || p != prefix(want) {
			t.Errorf("from the third on, and then from the start: %s, want %s", p, want)
		}
		claimed[p] = true
	}
	if p, ok := r.FreeBlock(26, Place(r.Subnet, 26, 2), is); ok {
		t.Fatalf("a fifth block %s of four", p)
	}
	clear(claimed)
	x, _ := metadata.ParseRange("10.0.0.0-10.200.3.70")
	wide := Rules{Subnet: prefix("10.0.0.0/8"), Exclude: []metadata.Range{x}}
	if p, _ := wide.FreeBlock(26, first(wide), is); p != prefix("10.200.3.64/26") {
		t.Errorf("the first block that an exclusion leaves something of: %s", p)
	}
	if p, _ := wide.FreeBlock(26, addr("10.90.0.0"), is); p != prefix("10.200.3.64/26") {
		t.Errorf("begun in the exclusion: %s", p)
	}
	x, _ = metadata.ParseRange("10.100.0.0-10.255.255.255")
	wide.Exclude = []metadata.Range{x}
	if p, _ := wide.FreeBlock(26, addr("10.200.0.0"), is); p != prefix("10.0.0.0/26") {
		t.Errorf("begun in an exclusion that reaches to the end: %s", p)
	}
	x, _ = metadata.ParseRange("10.0.0.0/8")
	if p, ok := (Rules{Subnet: prefix("10.0.0.0/8"), Exclude: []metadata.Range{x}}).FreeBlock(26, addr("10.200.0.0"),
		is); ok {
		t.Errorf("%s is excluded", p)
	}
	if n := Blocks(prefix("fd42::/48"), 122); n <= 1<<60 {
		t.Errorf("%d", n)
	}
	if p, _ := (Rules{Subnet: prefix("fd42::/64")}).FreeBlock(122, addr("fd42::"), is); p != prefix("fd42::/122") {
		t.Errorf("%s", p)
	}
}

func TestPlaces(t *testing.T) {
	for _, c := range []struct {
		subnet string
		bits   int
		number uint64
		want   string
	}{
		{"10.0.0.0/16", 26, 0, "10.0.0.0"},
		{"10.0.0.0/16", 26, 1023, "10.0.255.192"},
		{"10.0.0.0/16", 26, 1024 + 5, "10.0.1.64"},
		{"10.0.0.0/26", 26, 77, "10.0.0.0"},
		{"10.0.0.0/30", 32, 3, "10.0.0.3"},
		{"10.0.0.0/8", 16, 0x1ff, "10.255.0.0"},
		{"fd42::/64", 122, 1<<58 - 1, "fd42::ffff:ffff:ffff:ffc0"},
		{"fd42::/48", 112, 1<<64 - 1, "fd42::ffff:ffff:ffff:ffff:0"},
		{"fd42::/32", 122, 1<<64 - 1, "fd42::3f:ffff:ffff:ffff:ffc0"},
		{"fd42::/64", 128, 9, "fd42::9"},
	} {
		if got := Place(prefix(c.subnet), c.bits, c.number); got != addr(c.want) {
			t.Errorf("block %d of %s is at %s, want %s", c.number, c.subnet, got, c.want)
		}
	}
}

func TestBorrowersSpread(t *testing.T) {
	var blocks []metadata.Block
	for i := range 32 {
		blocks = append(blocks, metadata.Block{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24),
			Host: []string{"a", "b", "c"}[i%3]})
	}
	firsts := map[netip.Prefix]bool{}
	for i := range 16 {
		order := BorrowOrder(blocks, fmt.Sprint("h", i))
		if len(order) != 32 {
			t.Fatal(len(order))
		}
		firsts[order[0].CIDR] = true
	}
	if len(firsts) < 6 {
		t.Errorf("16 hosts start at only %d of 32 blocks", len(firsts))
	}
	if slices.ContainsFunc(BorrowOrder(blocks, "a"), func(b metadata.Block) bool { return b.Host == "a" }) {
		t.Error("a host borrows from itself")
	}
}

// The table against a model of it: whatever happens, no address is in use twice, none is lost, the order of release is
// kept, and what is stored reads back the same.
func TestRandomUseKeepsInvariants(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		tb := &Table{CIDR: prefix("10.0.1.0/27")}
		usable := func(a netip.Addr) bool { return a != addr("10.0.1.7") }
		var order []netip.Addr // of release
		used := map[netip.Addr]string{}
		now, seq := start, uint64(0)
		for step := range 400 {
			now = now.Add(time.Duration(rnd.IntN(3)) * time.Second)
			if rnd.IntN(2) == 0 {
				a, ok := tb.Fresh(usable)
				if !ok {
					var r Rest
					if r, ok = tb.Rested(now, usable); ok {
						a = r.Address
						if a != order[0] {
							t.Fatalf("seed %d step %d: %s before %s", seed, step, a, order[0])
						}
					}
				}
				if !ok {
					if len(used) != 31 {
						t.Fatalf("seed %d: full at %d", seed, len(used))
					}
					continue
				}
				seq++
				id := fmt.Sprint("c", step)
				if !tb.Take(entry(a, id, seq)) || used[a] != "" {
					t.Fatalf("seed %d: %s twice", seed, a)
				}
				used[a] = id
				order = slices.DeleteFunc(order, func(x netip.Addr) bool { return x == a })
			} else {
				var victim string
				for _, id := range used {
					victim = id
					break
				}
				for _, e := range tb.Release(now, func(e Entry) bool { return e.ID.ContainerID == victim }) {
					delete(used, e.Address)
					order = append(order, e.Address)
				}
			}
			u := tb.Usage(usable)
			if u.Used != len(used) || u.Used+u.Free() != 31 {
				t.Fatalf("seed %d: %+v with %d used", seed, u, len(used))
			}
		}
		data, err := json.Marshal(tb)
		if err != nil {
			t.Fatal(err)
		}
		back, err := Decode(tb.CIDR, data)
		if err != nil {
			t.Fatal(err)
		}
		again, _ := json.Marshal(back)
		if string(again) != string(data) {
			t.Fatalf("\n%s\n%s", data, again)
		}
	}
}

// TestOwnersAreStoredOnce: the state directory is an owner's third part, and absent where it is the default.
func TestOwnersAreStoredOnce(t *testing.T) {
	const stored = `{"next":4,"owners":[["a","boot"],["a","boot","/srv/lariat"]],"entries":[` +
		`{"a":"10.0.0.1","id":"x","if":"eth0","o":0,"s":1},{"a":"10.0.0.2","id":"y","if":"eth0","o":1,"s":2},{"a":"10.0.0.3","id":"z","if":"eth0","o":0,"s":3}]}`
	tb, err := Decode(prefix("10.0.0.0/30"), []byte(stored))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"", "/srv/lariat", ""} {
		if o := tb.Entries[i].Owner; o != (Owner{Host: "a", BootID: "boot", StateDir: want}) {
			t.Errorf("entry %d: owner %+v", i, o)
		}
	}
	if data, err := json.Marshal(tb); err != nil || string(data) != stored {
		t.Errorf("%v\n%s\n%s", err, data, stored)
	}
}

func TestDecodeRefusesContradictions(t *testing.T) {
	for _, s := range []string{
		`{"owners":[["a","b"]],"entries":[{"a":"10.0.0.9","id":"x","if":"e","o":0,"s":1}]}`,
		`{"owners":[["a","b"]],"entries":[{"a":"10.0.0.1","id":"x","if":"e","o":0,"s":1},{"a":"10.0.0.1","id":"y","if":"e","o":0,"s":2}]}`,
		`{"entries":[{"a":"10.0.0.1","id":"x","if":"e","o":0,"s":1}]}`,
		`{"owners":[["a"]],"entries":[{"a":"10.0.0.1","id":"x","if":"e","o":0,"s":1}]}`,
		`{"owners":[["a","b"]],"entries":[{"a":"10.0.0.1","id":"x","if":"e","o":0,"s":1}],"resting":[{"a":"10.0.0.1","t":1}]}`,
		`{"resting":[{"a":"10.0.0.1","t":1},{"a":"10.0.0.1","t":1}]}`,
		`{`,
	} {
		if _, err := Decode(prefix("10.0.0.0/30"), []byte(s)); err == nil {
			t.Errorf("accepted %s", s)
		}
	}
}

func FuzzDecode(f *testing.F) {
	tb := &Table{CIDR: prefix("10.0.0.0/26")}
	tb.Take(entry(addr("10.0.0.5"), "c1", 4))
	tb.Take(entry(addr("10.0.0.6"), "c2", 5))
	tb.Release(start, func(e Entry) bool { return e.ID.ContainerID == "c1" })
	data, _ := json.Marshal(tb)
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		tb, err := Decode(prefix("10.0.0.0/26"), data)
		if err != nil {
			return
		}
		u := tb.Usage(func(netip.Addr) bool { return true })
		if u.Used+u.Free() != 64 {
			t.Fatalf("%+v", u)
		}
		out, err := json.Marshal(tb)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(tb.CIDR, out); err != nil {
			t.Fatalf("%v: what it writes it must read: %s", err, out)
		}
	})
}
