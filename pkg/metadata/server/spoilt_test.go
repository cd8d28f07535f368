package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// corrupt are entries that nobody can use. Each is put into the store under a key of its kind, beside good ones.
var spoilt = map[string]string{ // key in the store: value
	"view/hosts/empty":                `{}`,
	"view/hosts/null":                 `null`,
	"view/hosts/broken":               `{not json`,
	"view/hosts/other":                `{"name":"a"}`,
	"view/hosts/nowhere":              `{"name":"nowhere","underlay":[{"address":"224.0.0.1/32"}]}`,
	"view/live/empty":                 `{}`,
	"view/live/broken":                `{not json`,
	"view/networks/null":              `null`,
	"view/networks/broken":            `{not json`,
	"view/networks/everything":        `{"name":"everything","subnets":["0.0.0.0/0"],"encapsulation":"vxlan","vni":7}`,
	"view/networks/loopback":          `{"name":"loopback","subnets":["127.0.0.0/8"],"encapsulation":"ipsec"}`,
	"view/networks/twin":              `{"name":"twin","subnets":["10.42.0.0/24"],"encapsulation":"vxlan","vni":8}`,
	"view/blocks/lan/0.0.0.0/0":       `{"network":"lan","cidr":"0.0.0.0/0","host":"a"}`,
	"view/blocks/lan/10.43.0.0/26":    `{"network":"lan","cidr":"10.43.0.0/26","host":"b"}`,
	"view/blocks/lan/10.42.0.0/17":    `{"network":"lan","cidr":"10.42.0.0/17","host":"a"}`,
	"view/blocks/lan/10.42.128.0/26":  `{"network":"lan","cidr":"10.42.192.0/26","host":"b"}`,
	"view/blocks/lan/10.42.129.0/26":  `{"network":"lan","cidr":"10.42.129.0/26","host":"b","gateway":"10.42.0.9"}`,
	"view/blocks/lan/10.42.130.0/26":  `{not json`,
	"view/blocks/lan/10.42.131.0/26":  `{"network":"lan","cidr":"10.42.131.0/26","host":"../b"}`,
	"view/blocks/lan/nothing":         `null`,
	"view/endpoints/lan/8.8.8.8":      `{"network":"lan","address":"8.8.8.8","host":"b"}`,
	"view/endpoints/lan/192.0.2.1":    `{"network":"lan","address":"192.0.2.1","host":"b"}`,
	"view/endpoints/lan/10.42.200.9":  `{}`,
	"view/endpoints/lan/10.42.200.10": `{not json`,
	"containers/a/empty":              `{}`,
	"containers/a/broken":             `{not json`,
	"containers/b/null":               `null`,
	"containers/b/moved":              `{"id":"elsewhere","host":"b"}`,
	"volumes/b/lariat-nfs/empty":      `{}`,
	"volumes/b/lariat-nfs/broken":     `{not json`,
	"addresses/lan/10.42.140.0/26":    `{not json`,
	"addresses/lan/10.42.141.0/26":    `{"entries":[{"a":"10.43.0.1","id":"x","if":"eth0","o":0}]}`,
	"addresses/lan/0.0.0.0/0":         `{}`,
	"addresses/lan/nothing":           `null`,
	"view/hosts/" + long:              `{"name":"` + long + `"}`,
	"view/networks/" + long: `{"name":"` + long +
		`","subnets":["10.99.0.0/16"],"encapsulation":"vxlan","vni":9,"hostNAT":true}`,
	"view/networks/" + "esc\x1b[31m\nape": `{}`,
}

// harmless are spoilt as well; they say nothing that anybody would use.
var harmless = map[string]string{
	"vnis/1042":              `{not json`,
	"vnis/1043":              `null`,
	"macs/0e:00:c0:00:02:03": `{not json`,
	"view/unknown/kind":      `{not json`,
	"unknown":                `{not json`,
}

var long = strings.Repeat("n", 3000)

func inject(t testing.TB, st store.Store, entries map[string]string) {
	t.Helper()
	for key, value := range entries {
		if _, err := store.One(t.Context(), st,
			store.Change{Key: key, Value: []byte(value), Revision: store.Any}); err != nil {
			t.Fatal(err)
		}
	}
}

// want looks at all that people and helpers ask a service: nothing fails, what is good is there, what is not
// is a problem that names its key.
func wantUnharmed(t *testing.T, n *node, when string) {
	t.Helper()
	ctx := t.Context()
	view, err := n.View(ctx)
	if err != nil {
		t.Fatalf("%s: view: %v", when, err)
	}
	if len(view.Hosts) != 2 || len(view.Networks) != 1 || len(view.Blocks) != 2 || len(view.HostRoutes) != 0 {
		t.Errorf("%s: the view holds %d hosts, %d networks, %v, %v", when, len(view.Hosts), len(view.Networks), view.Blocks,
			view.HostRoutes)
	}
	all, err := n.Client.Problems(ctx)
	if err != nil {
		t.Fatalf("%s: problems: %v", when, err)
	}
	keys := map[string]metadata.Problem{}
	for _, p := range all {
		keys[p.Key] = p
		if s := p.String() + p.Remedy(); strings.ContainsAny(s, "\n\x1b") || len(s) > 2000 ||
			!strings.Contains(p.Remedy(), "lariat entry remove "+p.Name()) {
			t.Errorf("%s: %q", when, s)
		}
	}
	for key := range spoilt {
		if key = strings.TrimPrefix(key, entry.ViewPrefix); keys[key].What == "" {
			t.Errorf("%s: no problem names %.100q", when, key)
		} else if strings.HasPrefix(key, metadata.KindNetwork) && !slices.Contains(view.Problems, keys[key]) {
			t.Errorf("%s: the view does not tell of %.100q", when, key)
		}
		delete(keys, key)
	}
	for key := range keys {
		t.Errorf("%s: a problem of %.100q", when, key)
	}
	eventually(t, n, func(s *metadata.Snapshot) bool {
		return len(s.Blocks) == 2 &&
			len(s.Problems) == len(view.Problems)
	})

	if s, err := n.Client.Snapshot(ctx); err != nil || len(s.Containers) != 1 {
		t.Errorf("%s: the snapshot holds %d containers: %v", when, len(s.Containers), err)
	}
	if st, err := n.Client.Status(ctx, "lan"); err != nil || !st.Ready {
		t.Errorf("%s: status: %+v %v", when, st, err)
	}
	if list, err := n.Client.Allocations(ctx, "lan", true); err != nil || len(list) != 1 {
		t.Errorf("%s: allocations: %v %v", when, list, err)
	}
	if list, err := n.Client.Volumes(ctx, false); err != nil || len(list) != 0 {
		t.Errorf("%s: volumes: %v %v", when, list, err)
	}
	for _, kind := range []string{"networks", "hosts", "blocks", "endpoints", "containers"} {
		var out json.RawMessage
		if err := n.Do(ctx, "GET", "/v1/"+kind, nil, &out); err != nil || bytes.Contains(out, []byte("0.0.0.0/0")) {
			t.Errorf("%s: %s: %s %v", when, kind, out, err)
		}
	}
}

// TestF163_SpoiltEntriesHarmNobody: whatever stands under a key of whatever kind, before a service starts or
// while it runs, nothing breaks, and a problem names the key.
func TestF163_SpoiltEntriesHarmNobody(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, a, "lan", overlay("10.42.0.0/16"))
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	attach(t, a, "lan", req("web"))
	if err := b.Client.Join(ctx, "lan"); err != nil {
		t.Fatal(err)
	}
	inject(t, st, spoilt)
	inject(t, st, harmless)
	last, err := store.One(ctx, st, store.Change{Key: "view/unknown/kind", Value: []byte("x"), Revision: store.Any})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, b} {
		if err := n.view.Wait(ctx, last); err != nil {
			t.Fatal(err)
		}
	}
	wantUnharmed(t, a, "running")
	a.stop()
	a = startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	wantUnharmed(t, a, "restarted")

	// Life goes on.
	got := attach(t, a, "lan", req("second"))
	if x := got.Addresses[0].Address; !netip.MustParsePrefix("10.42.0.0/26").Contains(x) {
		t.Errorf("it got %s", x)
	}
	for _, id := range []string{"empty", "broken"} {
		attach(t, a, "lan", req(id)) // over a spoilt entry of that container
	}
	define(t, a, "more", overlay("10.44.0.0/16")) // over a spoilt reservation of the next VNI
	startNode(t, st, hostConfig("c", "192.0.2.3/24"))
	if _, err := a.PutNetwork(ctx,
		metadata.Network{Name: "broken", Subnets: []netip.Prefix{netip.MustParsePrefix("10.45.0.0/16")}}, true,
		false); err == nil || !strings.Contains(err.Error(), "lariat entry remove networks/broken") {
		t.Errorf("a network over a spoilt one: %v", err)
	}

	// And the remedy is one.
	if err := a.Client.RemoveEntry(ctx, "blocks/lan/"+
		a.view.Blocks("lan", func(metadata.Block) bool { return true })[0].CIDR.String()); !metadata.IsCode(err,
		metadata.CodeConflict) {
		t.Errorf("a good entry was removed: %v", err)
	}
	all, err := a.Client.Problems(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		// some went with others
		if err := a.Client.RemoveEntry(ctx, p.Key); err != nil && !strings.Contains(err.Error(), "nothing is wrong") {
			t.Errorf("%s: %v", p, err)
		}
	}
	if all, err = a.Client.Problems(ctx); err != nil || len(all) > 0 {
		t.Errorf("left: %v %v", all, err)
	}
	eventually(t, a, func(s *metadata.Snapshot) bool { return len(s.Problems) == 0 && len(s.Blocks) >= 2 })
}

// TestSpoiltOverGood: what a good entry said stays in force when it is spoilt while the service runs, and a
// host's own is written anew.
func TestSpoiltOverGood(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, a, "lan", overlay("10.42.0.0/16"))
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	attach(t, a, "lan", req("web"))
	block := "view/blocks/lan/10.42.0.0/26"
	inject(t, st, map[string]string{
		"view/networks/lan": `{}`,
		block:               `{"network":"lan","cidr":"10.42.0.0/26","host":"b"}`, // another host's now
	})
	has := func(keys ...string) func(*metadata.Snapshot) bool {
		return func(s *metadata.Snapshot) bool {
			return len(s.Problems) == len(keys) &&
				!slices.ContainsFunc(s.Problems, func(p metadata.Problem) bool { return !slices.Contains(keys, p.Key) }) &&
				len(s.Networks) == 1 && len(s.Blocks) == 1 && s.Blocks[0].Host == "a" && len(s.Hosts) == 2
		}
	}
	eventually(t, b, has("networks/lan", "blocks/lan/10.42.0.0/26"))

	// A service that starts now cannot know what stood there, and does not follow the new word either. Of the
	// network it knows nothing.
	b.stop()
	b = startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	if s, err := b.View(ctx); err != nil || len(s.Blocks) != 0 || len(s.Networks) != 0 || len(s.Problems) != 2 {
		t.Errorf("%+v %v", s, err)
	}
	old, _, _ := a.view.Network("lan")
	data, _ := json.Marshal(old)
	inject(t, st, map[string]string{"view/networks/lan": string(data)})
	eventually(t, b, func(s *metadata.Snapshot) bool {
		return len(s.Networks) == 1 && len(s.Blocks) == 0 && len(s.Problems) == 1
	})

	// The host itself, restarted, announces one by one what the block announced.
	a.stop()
	a = startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	eventually(t, b, func(s *metadata.Snapshot) bool { return len(s.HostRoutes) == 1 && s.HostRoutes[0].Host == "a" })
	attach(t, a, "lan", req("next"))

	// Its own entries.
	for _, garbage := range []string{`{}`, `{not json`, `null`} {
		for _, key := range []string{entry.HostPrefix + "a", entry.LivePrefix + "a"} {
			at, err := store.One(ctx, st, store.Change{Key: key, Value: []byte(garbage), Revision: store.Any})
			if err != nil {
				t.Fatal(err)
			}
			anew := errors.New("written anew")
			if err := st.Watch(ctx, key, at, func(u store.Update) error {
				if len(u.Entries) > 0 && string(u.Entries[0].Value) != garbage {
					return anew
				}
				return nil
			}); !errors.Is(err, anew) {
				t.Fatal(err)
			}
		}
		for _, n := range []*node{a, b} {
			eventually(t, n, func(s *metadata.Snapshot) bool {
				h, ok := s.Host("a")
				return ok && h.Live && h.MachineID == "machine-a" && len(s.Problems) == 1
			})
		}
	}
}

// TestLastValidValueOutlivesARestart: what became invalid stays in force also when the service starts anew, until
// it is valid again or gone. What was never valid is left out.
func TestLastValidValueOutlivesARestart(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, a, "lan", overlay("10.42.0.0/16"))
	attach(t, a, "lan", req("web"))
	startNode(t, st, hostConfig("gone", "192.0.2.3/24")).stop()
	good := map[string]string{}
	for _, key := range []string{"view/networks/lan", "view/hosts/gone", "view/blocks/lan/10.42.0.0/26"} {
		e, err := st.Get(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		good[key] = string(e.Value)
	}
	cfg := hostConfig("b", "192.0.2.2/24")
	cfg.Kept = filepath.Join(t.TempDir(), "state", "entries.json")
	for _, garbage := range []string{`{}`, `null`, `{not json`} {
		b := startNode(t, st, cfg)
		bad := map[string]string{}
		for key := range good {
			bad[key] = garbage
		}
		inject(t, st, bad)
		inject(t, st, map[string]string{"view/networks/never": garbage})
		whole := func(s *metadata.Snapshot) bool {
			_, there := s.Host("gone")
			for key := range good {
				if !slices.ContainsFunc(s.Problems, func(p metadata.Problem) bool {
					return "view/"+p.Key == key && strings.Contains(p.What, "its last valid value stays in force")
				}) {
					return false
				}
			}
			return there && len(s.Hosts) == 3 && len(s.Networks) == 1 && len(s.Blocks) >= 1 && s.Blocks[0].Host == "a" &&
				len(s.Problems) == len(good)+1
		}
		eventually(t, b, whole)
		for range 2 {
			b.stop()
			b = startNode(t, st, cfg)
			if s, err := b.View(ctx); err != nil || !whole(s) {
				t.Fatalf("%s, after a restart: %+v %v", garbage, s, err)
			}
		}
		if x := attach(t, b, "lan", req("here")).Addresses[0].Address; netip.MustParsePrefix("10.42.0.0/26").Contains(x) {
			t.Errorf("%s lies in the block of a", x)
		}
		b.stop()
		// Mended while nobody looks. A block is never written over, so it is made anew.
		if _, err := store.One(ctx, st, store.Change{Key: "view/blocks/lan/10.42.0.0/26", Revision: store.Any}); err != nil {
			t.Fatal(err)
		}
		inject(t, st, good)
		b = startNode(t, st, cfg)
		eventually(t, b, func(s *metadata.Snapshot) bool { return len(s.Problems) == 1 && len(s.Networks) == 1 })
		b.stop()
		if data, err := os.ReadFile(cfg.Kept); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("kept for nothing: %s %v", data, err)
		}
	}
	// A file that cannot be read keeps nobody from starting.
	if err := os.WriteFile(cfg.Kept, []byte("{not json"), 0o600); err != nil {
		t.Fatal(err)
	}
	startNode(t, st, cfg)
}

// TestSpoiltTable: a table that cannot be read gives nothing out, for nobody knows what is in use, and other
// blocks serve.
func TestSpoiltTable(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, a, "lan", overlay("10.42.0.0/16"))
	first := attach(t, a, "lan", req("web")).Addresses[0].Address
	a.stop()
	inject(t, st, map[string]string{entry.TablePrefix + "lan/10.42.0.0/26": `{not json`})
	a = startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	got := attach(t, a, "lan", req("other")).Addresses[0].Address
	if netip.MustParsePrefix("10.42.0.0/26").Contains(got) {
		t.Errorf("%s may be somebody's", got)
	}
	_, err := a.Client.Attach(ctx, "lan", req("third", first.String()))
	wantCode(t, err, metadata.CodeHeld, "lariat entry remove addresses/lan/10.42.0.0/26")
	if err := a.Client.Release(ctx, "lan", aid("web"), 0); err != nil {
		t.Error(err)
	}
	wantCode(t, a.Client.Delete(ctx, "networks", "lan"), metadata.CodeConflict,
		"lariat entry remove addresses/lan/10.42.0.0/26")
	if err := a.Server.ReleaseEmptyBlocks(ctx, "lan"); err != nil {
		t.Error(err)
	}
	if err := a.Client.RemoveEntry(ctx, "addresses/lan/10.42.0.0/26"); err != nil {
		t.Fatal(err)
	}
	if st, err := a.Client.Status(ctx, "lan"); err != nil || !st.Ready {
		t.Error(fmt.Sprint(st), err)
	}
}

// TestForeignAddressesOutside: an address outside of the subnets is announced only when it diverts nothing of others.
func TestForeignAddressesOutside(t *testing.T) {
	n, _ := one(t, overlay("10.42.0.0/16"))
	for _, outside := range []string{"8.8.8.8", "192.0.2.77", "169.254.169.254"} {
		r := req("dhcp", outside)
		r.Foreign = true
		_, err := n.Client.Attach(t.Context(), "lan", r)
		wantCode(t, err, metadata.CodeInvalid, outside)
	}
}

// TestClaimsOfADeletedNetworkGo: a service that is killed while it deletes a network leaves claims of it. Each host
// deletes its own. An entry that cannot be used is no deleted network.
func TestClaimsOfADeletedNetworkGo(t *testing.T) {
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	a, b := startNode(t, st, hostConfig("a", "192.0.2.1/24")), startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	if err := a.Client.Put(t.Context(), metadata.KindNetwork, "lan", overlay("10.42.0.0/16")); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, b} {
		if err := n.Client.Join(t.Context(), "lan"); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (hosts []string) {
		t.Helper()
		list, _, err := store.List(t.Context(), st, entry.BlockPrefix+"lan/", time.Minute)
		must(t, err)
		for _, e := range list {
			block, err := metadata.Decode[metadata.Block](strings.TrimPrefix(e.Key, entry.BlockPrefix), e.Value)
			must(t, err)
			hosts = append(hosts, block.Host)
		}
		slices.Sort(hosts)
		return hosts
	}
	write := func(value []byte) {
		t.Helper()
		revision, err := store.One(t.Context(), st,
			store.Change{Key: entry.NetworkPrefix + "lan", Value: value, Revision: store.Any})
		must(t, err)
		for _, n := range []*node{a, b} {
			must(t, n.view.Wait(t.Context(), revision))
		}
	}
	if got := fmt.Sprint(left()); got != "[a b]" {
		t.Fatalf("blocks of %s", got)
	}
	write([]byte("{not json"))
	must(t, a.releaseOrphans(t.Context()))
	if got := fmt.Sprint(left()); got != "[a b]" {
		t.Errorf("the network's entry cannot be used, and the blocks that are left are of %s", got)
	}
	write(nil)
	must(t, a.releaseOrphans(t.Context()))
	if got := fmt.Sprint(left()); got != "[b]" {
		t.Errorf("a has deleted its own, and blocks are left of %s", got)
	}
	must(t, b.releaseOrphans(t.Context()))
	if got := fmt.Sprint(left()); got != "[]" {
		t.Errorf("blocks are left of %s", got)
	}
}
