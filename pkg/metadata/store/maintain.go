package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// An embedded member looks after itself: nobody will run etcdctl on it for years.
//
// History is dropped by count, not by age: a burst of a hundred thousand writes within etcd's five-minute compaction
// interval would otherwise outgrow any quota. External stores are left alone, they have owners.
const (
	keepRevisions    = 5000  // a watcher that lags further starts over from a snapshot
	compactEvery     = 10000 // revisions
	defragAtLeast    = 64 << 20
	maintainInterval = time.Second
)

func (e *Etcd) maintain() {
	t := time.NewTicker(maintainInterval)
	defer t.Stop()
	var compacted, lastWrites int64
	for {
		force := false
		select {
		case <-e.done.Done():
			return
		case <-e.repair:
			force = true
		case <-t.C:
		}
		e.checkRoom()
		var st Status
		e.member.status(&st)
		if st.Leader && (force || st.Revision-compacted > compactEvery) && st.Revision > keepRevisions {
			keep := int64(keepRevisions)
			if force {
				keep = 1
			}
			if err := e.compact(st.Revision - keep); err != nil {
				e.log.Warn("compaction failed", "error", err)
			} else {
				compacted = st.Revision
			}
		}
		writes := e.writes.Load()
		busy := writes-lastWrites > 5
		lastWrites = writes
		if waste := st.Size - st.InUse; force || (!busy && waste > defragAtLeast && waste > st.Size/2) {
			e.defragment(force)
		}
	}
}

// checkRoom refuses writes while the disk has no room for another piece of log, and lets them go on afterwards.
func (e *Etcd) checkRoom() {
	err := e.member.room()
	switch old := e.problem.Load(); {
	case err != nil && old == nil:
		text := err.Error()
		e.problem.Store(&text)
		e.log.Error("writes are refused", "error", err)
	case err == nil && old != nil:
		e.problem.Store(nil)
		e.log.Info("writes go on", "folder", e.member.dir)
	}
}

func (e *Etcd) compact(revision int64) error {
	ctx, cancel := context.WithTimeout(e.done, 30*time.Second)
	defer cancel()
	_, err := e.client.Compact(ctx, revision, clientv3.WithCompactPhysical())
	if err = e.fault("compact", "history", err); err != nil && !errors.Is(err, ErrCompacted) {
		return err
	}
	return nil
}

// defragment rewrites this member's data file. It stops the member's reads and writes meanwhile, which is why it waits
// for a quiet moment, and why of several members only one does it at a time.
func (e *Etcd) defragment(force bool) {
	ctx, cancel := context.WithTimeout(e.done, time.Minute)
	defer cancel()
	if !force {
		lease, err := e.Hold(ctx, time.Minute)
		if err != nil {
			return
		}
		defer lease.Close()
		if _, err := One(ctx, e, Change{Key: "maintenance/defragment", Value: []byte("{}"), Lease: lease}); err != nil {
			return // another member is at it
		}
	}
	start, before := time.Now(), e.member.etcd.Server.Backend().Size()
	if free, err := e.member.free(); err == nil && free < e.member.etcd.Server.Backend().SizeInUse()+minFree {
		e.log.Debug("no room to defragment in", "folder", e.member.dir, "free", free)
		return
	}
	if err := e.member.etcd.Server.Backend().Defrag(); err != nil {
		e.log.Error("defragmentation failed", "error", e.member.explain(err))
		return
	}
	e.log.Info("defragmented", "before", before, "after", e.member.etcd.Server.Backend().Size(), "took", time.Since(start))
}

// mend makes room after etcd refused a write because its quota is used up, and takes the alarm back. It reports whether
// another try makes sense.
func (e *Etcd) mend(ctx context.Context) bool {
	if e.member == nil || ctx.Err() != nil {
		return false
	}
	e.mendMu.Lock()
	defer e.mendMu.Unlock()
	s := e.member.etcd.Server
	if len(s.Alarms()) == 0 {
		return true // someone mended it meanwhile
	}
	e.log.Debug("quota used up: dropping history", "folder", e.member.dir, "size", s.Backend().Size(), "inUse",
		s.Backend().SizeInUse())
	if err := e.compact(s.KV().Rev()); err != nil {
		e.log.Error("compaction failed", "error", err)
		return false
	}
	s.Backend().ForceCommit() // what compaction freed counts only then, and the commit may be a tenth of a second away
	quota := s.Cfg.QuotaBackendBytes
	// What bbolt says to be in use includes pages that were freed a moment ago. So a file that seems full is
	// tried once, and again when something was deleted, which is all that can change it now.
	revision := s.KV().Rev()
	if s.Backend().SizeInUse() < quota*9/10 || revision != e.futile {
		e.defragment(true)
	}
	if s.Backend().Size() > quota*9/10 {
		e.futile = revision
		text := fmt.Sprintf("data folder %s: %d MiB of data in use, the quota is %d MiB; raise --etcd-quota and start "+
			"again, or remove what is unused",
			e.member.dir, s.Backend().SizeInUse()>>20, quota>>20)
		if e.full.Swap(&text) == nil {
			e.log.Error("the store is full", "problem", text)
		}
		return false
	}
	e.full.Store(nil)
	for _, a := range s.Alarms() {
		if a.Alarm != pb.AlarmType_NOSPACE {
			continue
		}
		if _, err := e.client.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: a.MemberID, Alarm: a.Alarm}); err != nil {
			e.log.Error("alarm not taken back", "error", err)
			return false
		}
	}
	e.log.Info("the store has room again", "folder", e.member.dir, "size", s.Backend().Size())
	return true
}
