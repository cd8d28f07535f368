package kernel

import (
	"context"
	"encoding/binary"
	"hash/fnv"
	"os"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyEvery is how often the older iptables' rules are looked at: nothing announces a change of them. A look at
// a table of a hundred rules takes some microseconds.
const legacyEvery = 500 * time.Millisecond

// LegacyFilter reports whether the older iptables has a filter table in the current network namespace. To ask for the
// table itself would make one.
func LegacyFilter(v6 bool) bool {
	name := "/proc/thread-self/net/ip_tables_names"
	if v6 {
		name = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(name)
	return err == nil && slices.Contains(strings.Fields(string(b)), "filter")
}

// legacyTable is the older iptables' filter table of one family (linux/netfilter_ipv4/ip_tables.h, ip6_tables.h).
type legacyTable struct {
	v6       bool
	level    int
	counters int // where they are in struct ipt_entry; next_offset is where next is
	next     int
}

var legacyTables = []legacyTable{
	{level: unix.IPPROTO_IP, counters: 96, next: 90},
	{v6: true, level: unix.IPPROTO_IPV6, counters: 152, next: 142},
}

const (
	soGetInfo    = 64 // IPT_SO_GET_INFO, struct ipt_getinfo
	soGetEntries = 65 // IPT_SO_GET_ENTRIES, struct ipt_get_entries

	sizeofInfo    = 84
	infoSize      = 80 // of the member size, the octets of all entries
	sizeofEntries = 40
	entriesSize   = 32
	sizeofCounter = 16

	mostEntries = 4 << 20 // octets; in larger tables only what is said of all entries is looked at
)

func getsockopt(fd, level, name int, buf []byte) error {
	n := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// sum is a digest of all rules without their counters; ok is false where there is no such table.
func (t legacyTable) sum(fd int) (sum uint64, ok bool) {
	if !LegacyFilter(t.v6) {
		return 0, false
	}
	info := make([]byte, sizeofInfo)
	copy(info, "filter")
	if getsockopt(fd, t.level, soGetInfo, info) != nil {
		return 0, false
	}
	h := fnv.New64a()
	h.Write(info)
	size := int(binary.NativeEndian.Uint32(info[infoSize:]))
	if size == 0 || size > mostEntries {
		return h.Sum64(), true
	}
	buf := make([]byte, sizeofEntries+size)
	copy(buf, "filter")
	binary.NativeEndian.PutUint32(buf[entriesSize:], uint32(size))
	if getsockopt(fd, t.level, soGetEntries, buf) != nil {
		return h.Sum64(), true // it grows or shrinks just now
	}
	for rest := buf[sizeofEntries:]; len(rest) >= t.counters+sizeofCounter; {
		n := int(binary.NativeEndian.Uint16(rest[t.next:]))
		if n < t.counters+sizeofCounter || n > len(rest) {
			break
		}
		h.Write(rest[:t.counters])
		h.Write(rest[t.counters+sizeofCounter : n])
		rest = rest[n:]
	}
	return h.Sum64(), true
}

// legacy reports changes of the older iptables' filter tables until the context ends.
func (w *watcher) legacy(ctx context.Context, fd int) {
	defer unix.Close(fd)
	type state struct {
		sum uint64
		ok  bool
	}
	seen := make([]state, len(legacyTables))
	for i, t := range legacyTables {
		seen[i].sum, seen[i].ok = t.sum(fd)
	}
	for tick := time.NewTicker(legacyEvery); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
		}
		for i, t := range legacyTables {
			var now state
			if now.sum, now.ok = t.sum(fd); now != seen[i] {
				seen[i] = now
				w.add(EventNft, "filter")
			}
		}
	}
}
