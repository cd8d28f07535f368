package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"
)

// Etcd is a Store in etcd v3, in this process or elsewhere.
type Etcd struct {
	client *clientv3.Client
	prefix string
	where  string // for messages: the folder, or the endpoints
	log    *slog.Logger

	member *member // nil: external
	done   context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	clock clock

	writes  atomic.Int64           // finished, for "is it busy?"
	problem atomic.Pointer[string] // the disk is nearly full
	full    atomic.Pointer[string] // the quota is used up by data in use
	repair  chan struct{}
	mendMu  sync.Mutex
	futile  int64 // revision at which defragmentation made too little room; guarded by mendMu

	// Observe, when set before use, hears how long each call took.
	Observe func(op string, took time.Duration, err error)
}

// clock notices that the store is another one than before: it was lost and made anew, and counts revisions from the
// beginning. Nothing that is known of the old one counts then. The id of the cluster does not tell: it is a hash of
// the members' addresses.
type clock struct {
	mu       sync.Mutex
	revision int64         // the highest that was seen
	anew     chan struct{} // closed when the store is another one
}

// now returns the highest revision that was seen, and a channel that is closed when the store is another one.
func (c *clock) now() (int64, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.anew == nil {
		c.anew = make(chan struct{})
	}
	return c.revision, c.anew
}

// answered takes the revision of an answer to what was asked when revision before had been seen.
func (c *clock) answered(revision, before int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if revision >= before {
		c.revision = max(c.revision, revision)
		return
	}
	c.revision = revision
	if c.anew != nil {
		close(c.anew)
		c.anew = nil
	}
}

// External says where an existing etcd is.
type External struct {
	Endpoints []string
	TLS       *tls.Config // nil: plain, for loopback and unix sockets only
	Prefix    string      // of all keys, with a trailing slash
	Log       *slog.Logger
}

// reconnect is how a lost store is looked for. gRPC's own pauses grow to two minutes, which a host would wait
// for after a long outage, and its tries last 20 s, where a machine is gone that could say that nobody
// listens.
var reconnect = grpc.ConnectParams{
	Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2,
		MaxDelay: time.Second},
	MinConnectTimeout: 3 * time.Second,
}

// Dial connects to an existing etcd. It fails when none of the endpoints answers within the context.
func Dial(ctx context.Context, c External) (*Etcd, error) {
	where := strings.Join(c.Endpoints, ",")
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   c.Endpoints,
		TLS:         c.TLS,
		DialTimeout: 5 * time.Second,
		// A peer that vanished without a word is noticed after 10+5 s, also when only watches are open.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		PermitWithoutStream:  true,
		DialOptions: []grpc.DialOption{grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}), grpc.WithConnectParams(reconnect)},
		Logger: zapTo(c.Log, nil, nil),
	})
	if err != nil {
		return nil, fmt.Errorf("etcd at %s: %w", where, err)
	}
	e := newEtcd(client, c.Prefix, where, c.Log)
	if _, err := e.Get(ctx, "version"); err != nil && !errors.Is(err, ErrNotFound) {
		_ = e.Close()
		return nil, fmt.Errorf("etcd at %s: %w; is it up, and do the certificates of --etcd-ca, --etcd-cert and "+
			"--etcd-key fit?", where, err)
	}
	return e, nil
}

func newEtcd(client *clientv3.Client, prefix, where string, log *slog.Logger) *Etcd {
	e := &Etcd{client: client, prefix: prefix, where: where, log: log, repair: make(chan struct{}, 1)}
	e.done, e.cancel = context.WithCancel(context.Background())
	return e
}

// Where names the store for messages: its endpoints, or its directory.
func (e *Etcd) Where() string { return e.where }

// Connected calls fn whenever a connection to the store is made or lost, until the context ends. An embedded
// store has no connection.
func (e *Etcd) Connected(ctx context.Context, fn func(bool)) {
	conn := e.client.ActiveConnection()
	if e.member != nil || conn == nil {
		return
	}
	for {
		s := conn.GetState()
		fn(s == connectivity.Ready)
		if !conn.WaitForStateChange(ctx, s) {
			return
		}
	}
}

// fault translates etcd's errors.
func (e *Etcd) fault(op, key string, err error) error {
	kind := ErrUnavailable
	switch {
	case err == nil:
		return nil
	case errors.Is(err, rpctypes.ErrCompacted), errors.Is(err, rpctypes.ErrFutureRev):
		kind = ErrCompacted
	case errors.Is(err, rpctypes.ErrNoSpace):
		kind = ErrNoSpace
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s %s: %w", op, key, err)
	}
	return fmt.Errorf("%w: %s %s in %s: %w", kind, op, key, e.where, err)
}

// patient tries again while the cluster elects a leader, which takes a second or two: then nothing was done,
// for certain. Other failures leave open what was done, and are the caller's.
func patient(ctx context.Context, try func() error) error {
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		err := try()
		if err == nil || !(errors.Is(err, rpctypes.ErrNoLeader) || errors.Is(err, rpctypes.ErrLeaderChanged) ||
			errors.Is(err, rpctypes.ErrNotLeader) ||
			strings.Contains(err.Error(), "raft proposal dropped")) {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return err
		case <-t.C:
		}
	}
}

func (e *Etcd) observe(op string, start time.Time, err *error) {
	if e.Observe != nil {
		e.Observe(op, time.Since(start), *err)
	}
}

// Get implements Store.
func (e *Etcd) Get(ctx context.Context, key string) (_ Entry, err error) {
	defer e.observe("get", time.Now(), &err)
	var r *clientv3.GetResponse
	seen, _ := e.clock.now()
	err = patient(ctx, func() error {
		r, err = e.client.Get(ctx, e.prefix+key)
		return err
	})
	if err != nil {
		return Entry{}, e.fault("read", key, err)
	}
	e.clock.answered(r.Header.Revision, seen)
	if len(r.Kvs) == 0 {
		return Entry{Key: key}, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	kv := r.Kvs[0]
	return Entry{Key: key, Value: kv.Value, Revision: kv.ModRevision, Created: kv.CreateRevision, Held: kv.Lease != 0}, nil
}

// Pages of a list, in objects: the first is large, for etcd counts all that is left for each. What does not come
// in time is asked for in smaller ones. An address table has about 8 KiB.
const (
	pageMost  = 4096
	pageLeast = 1024
)

// Page implements Store.
func (e *Etcd) Page(ctx context.Context, l *Listing) (err error) {
	defer e.observe("list", time.Now(), &err)
	if l.limit == 0 {
		l.limit, l.from = pageMost, e.prefix+l.Prefix
	}
	opts := []clientv3.OpOption{clientv3.WithRange(clientv3.GetPrefixRangeEnd(e.prefix + l.Prefix)),
		clientv3.WithLimit(l.limit),
		clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend), clientv3.WithRev(l.Revision)}
	var r *clientv3.GetResponse
	seen, _ := e.clock.now()
	err = patient(ctx, func() error {
		r, err = e.client.Get(ctx, l.from, opts...)
		return err
	})
	if err != nil {
		l.limit = max(l.limit/2, pageLeast)
		return e.fault("list", l.Prefix, err)
	}
	e.clock.answered(r.Header.Revision, seen)
	if l.Revision == 0 {
		l.Revision = r.Header.Revision
	}
	for _, kv := range r.Kvs {
		l.Entries = append(l.Entries, Entry{Key: string(kv.Key[len(e.prefix):]), Value: kv.Value, Revision: kv.ModRevision,
			Created: kv.CreateRevision, Held: kv.Lease != 0})
	}
	if l.Done = !r.More || len(r.Kvs) == 0; !l.Done {
		l.from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
	return nil
}

// Limits of one etcd transaction, below its defaults of 128 operations and 1.5 MiB.
const (
	maxOps   = 100
	maxBytes = 1 << 20
)

// Write implements Store.
func (e *Etcd) Write(ctx context.Context, changes ...Change) []Result {
	results := make([]Result, len(changes))
	for from := 0; from < len(changes); {
		to, size := from, 0
		for to < len(changes) && to-from < maxOps {
			size += len(changes[to].Key) + len(changes[to].Value) + 64
			if size > maxBytes && to > from {
				break
			}
			to++
		}
		e.write(ctx, changes[from:to], results[from:to], false)
		from = to
	}
	return results
}

// write tries all in one transaction: one proposal, one fsync. Only when a condition fails are they tried each alone.
func (e *Etcd) write(ctx context.Context, changes []Change, results []Result, unsure bool) {
	ok, lost, revision, err := e.txn(ctx, changes)
	unsure = unsure || lost
	if err == nil && !ok && len(changes) > 1 {
		var wg sync.WaitGroup
		for i := range changes {
			wg.Go(func() { e.write(ctx, changes[i:i+1], results[i:i+1], unsure) })
		}
		wg.Wait()
		return
	}
	if err == nil && !ok {
		err = fmt.Errorf("%s: %w", changes[0].Key, ErrConflict)
		if unsure {
			// What is in the way may be our own first try.
			now, gerr := e.Get(ctx, changes[0].Key)
			switch {
			case gerr == nil && changes[0].Value != nil && bytes.Equal(now.Value, changes[0].Value):
				revision, err = now.Revision, nil
			case errors.Is(gerr, ErrNotFound) && changes[0].Value == nil:
				err = nil
			}
		}
	}
	for i := range results {
		results[i] = Result{Revision: revision, Err: err}
	}
}

// firstTry bounds how long the first of several tries of a conditional write takes. While a leader is lost
// and not yet missed (a second), followers send it what they are asked to write, and nobody ever answers.
const firstTry = 1200 * time.Millisecond

// txn reports whether the conditions held, and whether an earlier try may have been done although nobody answered.
func (e *Etcd) txn(ctx context.Context, changes []Change) (ok, unsure bool, revision int64, err error) {
	defer e.observe("write", time.Now(), &err)
	if p := e.problem.Load(); p != nil && e.member != nil {
		if err := e.member.room(); err != nil {
			return false, false, 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	cmps := make([]clientv3.Cmp, 0, len(changes))
	ops := make([]clientv3.Op, 0, len(changes))
	for _, c := range changes {
		key := e.prefix + c.Key
		if c.Revision != Any {
			cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(key), "=", c.Revision))
		}
		switch {
		case c.Value == nil:
			ops = append(ops, clientv3.OpDelete(key))
		case c.Lease != nil:
			ops = append(ops, clientv3.OpPut(key, string(c.Value), clientv3.WithLease(clientv3.LeaseID(c.Lease.id))))
		default:
			ops = append(ops, clientv3.OpPut(key, string(c.Value)))
		}
	}
	for limit := firstTry; ; limit *= 2 {
		try, cancel := ctx, context.CancelFunc(func() {})
		if len(cmps) == len(changes) { // a condition makes a second try harmless
			try, cancel = context.WithTimeout(ctx, limit)
		}
		var r *clientv3.TxnResponse
		seen, _ := e.clock.now()
		err = patient(try, func() error {
			r, err = e.client.Txn(try).If(cmps...).Then(ops...).Commit()
			return err
		})
		expired := try.Err() != nil
		cancel()
		if err != nil && expired && ctx.Err() == nil {
			unsure = true
			continue
		}
		if errors.Is(err, rpctypes.ErrNoSpace) && e.mend(ctx) {
			unsure = true // the write that uses the quota up is applied, and then called refused
			continue
		}
		e.writes.Add(1)
		if err != nil {
			return false, unsure, 0, e.fault("write", changes[0].Key, err)
		}
		e.clock.answered(r.Header.Revision, seen)
		return r.Succeeded, unsure, r.Header.Revision, nil
	}
}

// Watch implements Store.
func (e *Etcd) Watch(ctx context.Context, prefix string, after int64, fn func(Update) error) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	// The client goes on with a watch by itself when it finds the store again, whichever that is by then.
	_, anew := e.clock.now()
	ch := e.client.Watch(ctx, e.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(after+1),
		clientv3.WithProgressNotify(), clientv3.WithCreatedNotify())
	if e.member == nil {
		// The embedded member tells every ten seconds that it is there; another etcd is asked to.
		go func() {
			t := time.NewTicker(10 * time.Second)
			defer t.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-t.C:
					if err := e.client.RequestProgress(ctx); err != nil {
						return
					}
				}
			}
		}()
	}
	for {
		var r clientv3.WatchResponse
		open := true
		select {
		case r, open = <-ch:
		case <-anew:
			return fmt.Errorf("%w: watch %s: %s was made anew", ErrCompacted, prefix, e.where)
		}
		if !open {
			break
		}
		if r.CompactRevision != 0 {
			return fmt.Errorf("watch %s from revision %d: %w", prefix, after, ErrCompacted)
		}
		if err := r.Err(); err != nil {
			return e.fault("watch", prefix, err)
		}
		// A store that was made anew counts from the beginning, and would be silent until it came to where the old
		// one was. A member that lags looks the same, and then everything is read once too often.
		if r.Created && r.Header.Revision < after {
			return fmt.Errorf("%w: watch %s: %s is at revision %d, and was at %d", ErrCompacted, prefix, e.where,
				r.Header.Revision, after)
		}
		// One answer may hold several revisions, but never part of one.
		for i := 0; i < len(r.Events); {
			u := Update{Revision: r.Events[i].Kv.ModRevision}
			for ; i < len(r.Events) && r.Events[i].Kv.ModRevision == u.Revision; i++ {
				ev := r.Events[i]
				u.Entries = append(u.Entries, Entry{Key: string(ev.Kv.Key[len(e.prefix):]), Value: ev.Kv.Value,
					Revision: ev.Kv.ModRevision, Created: ev.Kv.CreateRevision, Deleted: ev.Type == clientv3.EventTypeDelete,
					Held: ev.Kv.Lease != 0})
			}
			e.clock.answered(u.Revision, 0)
			if err := fn(u); err != nil {
				return err
			}
		}
		if r.IsProgressNotify() {
			if err := fn(Update{Revision: r.Header.Revision}); err != nil {
				return err
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return fmt.Errorf("%w: watch %s in %s ended", ErrUnavailable, prefix, e.where)
}

// Hold implements Store.
func (e *Etcd) Hold(ctx context.Context, ttl time.Duration) (*Lease, error) {
	g, err := e.client.Grant(ctx, int64(math.Ceil(ttl.Seconds())))
	if err != nil {
		return nil, e.fault("grant", "lease", err)
	}
	keep, stop := context.WithCancel(e.done)
	l := &Lease{id: int64(g.ID), lost: make(chan struct{})}
	var once sync.Once
	l.close = func() {
		once.Do(func() {
			stop()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(e.done), 2*time.Second)
			defer cancel()
			if _, err := e.client.Revoke(ctx, g.ID); err != nil {
				e.log.Debug("lease left to run out", "error", err)
			}
		})
	}
	e.wg.Go(func() {
		defer close(l.lost)
		for e.renew(keep, g.ID) {
		}
	})
	return l, nil
}

// Idle implements Store.
func (e *Etcd) Idle(ctx context.Context, key string) (idle, ttl time.Duration, err error) {
	defer e.observe("get", time.Now(), &err)
	r, err := e.client.Get(ctx, e.prefix+key)
	if err != nil {
		return 0, 0, e.fault("read", key, err)
	}
	if len(r.Kvs) == 0 || r.Kvs[0].Lease == 0 {
		return 0, 0, fmt.Errorf("lease of %s: %w", key, ErrNotFound)
	}
	l, err := e.client.TimeToLive(ctx, clientv3.LeaseID(r.Kvs[0].Lease))
	if err != nil {
		return 0, 0, e.fault("ask about the lease of", key, err)
	}
	if l.TTL < 0 {
		return 0, 0, fmt.Errorf("lease of %s: %w", key, ErrNotFound)
	}
	return time.Duration(l.GrantedTTL-l.TTL) * time.Second, time.Duration(l.GrantedTTL) * time.Second, nil
}

// renew keeps a lease until the store was silent for its duration, and reports whether it is there all the same. A
// store that was away gives every lease its time anew when it is back: its hosts need not write all their claims
// once more.
func (e *Etcd) renew(ctx context.Context, id clientv3.LeaseID) bool {
	ch, err := e.client.KeepAlive(ctx, id)
	for range ch { //nolint:revive // renewals carry no news
	}
	if err != nil || e.member != nil {
		return false
	}
	for ctx.Err() == nil {
		there, err := e.renewOnce(ctx, id)
		if err == nil {
			return there
		}
		t := time.NewTimer(time.Second/2 + rand.N(time.Second))
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
	return false
}

// renewOnce waits for the store, where etcd's client would ask it in a loop without a pause.
func (e *Etcd) renewOnce(ctx context.Context, id clientv3.LeaseID) (there bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	stream, err := pb.NewLeaseClient(e.client.ActiveConnection()).LeaseKeepAlive(ctx, grpc.WaitForReady(true))
	if err != nil {
		return false, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
		return false, err
	}
	r, err := stream.Recv()
	return err == nil && r.TTL > 0, err
}

// Problem returns why this host's own store refuses writes, and the remedy. It is empty when it does not, and of
// a store elsewhere.
func (e *Etcd) Problem() string {
	for _, p := range []*string{e.full.Load(), e.problem.Load()} {
		if p != nil {
			return *p
		}
	}
	return ""
}

// Status implements Store.
func (e *Etcd) Status(ctx context.Context) (Status, error) {
	st := Status{Problem: e.Problem()}
	if e.member != nil {
		e.member.status(&st)
		return st, nil
	}
	// Over the connections that are there, of any member: a dead one is passed over.
	r, err := pb.NewMaintenanceClient(e.client.ActiveConnection()).Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return st, e.fault("ask", "status", err)
	}
	st.Size, st.InUse, st.Revision = r.DbSize, r.DbSizeInUse, r.Header.Revision
	if st.Problem == "" && r.Leader == 0 {
		st.Problem = noLeader
	}
	return st, nil
}

// Backup writes the store's whole state at one moment, with its checksum at the end, as `etcdutl snapshot restore` and
// Restore read it. An external etcd's is written whole, whoever else uses it.
func (e *Etcd) Backup(ctx context.Context, w io.Writer) error {
	r, err := e.client.Snapshot(ctx)
	if err != nil {
		return e.fault("back up", "everything", err)
	}
	defer r.Close()
	if _, err := io.Copy(w, r); err != nil {
		return fmt.Errorf("back up %s: %w", e.where, err)
	}
	return nil
}

// Close implements Store.
func (e *Etcd) Close() error {
	e.cancel()
	var err error
	if e.member == nil {
		err = e.client.Close()
	} else {
		_ = e.client.Close() // in-process: nothing to hang up
	}
	e.wg.Wait()
	if e.member != nil {
		err = e.member.close()
	}
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}
