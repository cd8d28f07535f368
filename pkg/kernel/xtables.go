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

// legacyEvery is the interval between reads of the legacy iptables' rules.
// The kernel does not announce changes of these rules.
// A read of a table with a hundred rules takes some microseconds.
const legacyEvery = 500 * time.Millisecond

// LegacyFilter reports whether the legacy iptables has a filter table in the current network
// namespace. A request for the table itself would create one.
func LegacyFilter(v6 bool) bool {
	name := "/proc/thread-self/net/ip_tables_names"
	if v6 {
		name = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(name)
	return err == nil && slices.Contains(strings.Fields(string(b)), "filter")
}

// A legacyTable is the legacy iptables' filter table of one family
// (linux/netfilter_ipv4/ip_tables.h, ip6_tables.h).
type legacyTable struct {
	v6       bool
	level    int
	counters int // offset of the counters in struct ipt_entry
	next     int // offset of next_offset
}

var legacyTables = []legacyTable{
	{level: unix.IPPROTO_IP, counters: 96, next: 90},
	{v6: true, level: unix.IPPROTO_IPV6, counters: 152, next: 142},
}

const (
	soGetInfo    = 64 // IPT_SO_GET_INFO, struct ipt_getinfo
	soGetEntries = 65 // IPT_SO_GET_ENTRIES, struct ipt_get_entries

	sizeofInfo    = 84
	infoSize      = 80 // offset of the member size: the bytes of all entries
	sizeofEntries = 40
	entriesSize   = 32
	sizeofCounter = 16

	mostEntries = 4 << 20 // bytes; of larger tables only ipt_getinfo is read
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

// sum returns a digest of all rules without their counters.
// ok is false when there is no such table.
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
		return h.Sum64(), true // the table changes its size at this moment
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

// legacy reports changes of the legacy iptables' filter tables until the context ends.
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
