package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	grpcmeta "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// frame is a message that passes a proxy as it is.
type frame []byte

var protoCodec = encoding.GetCodecV2("proto")

type raw struct{}

func (raw) Marshal(v any) ([]byte, error) { return *v.(*frame), nil }

func (raw) Unmarshal(b []byte, v any) error { *v.(*frame) = bytes.Clone(b); return nil }

func (raw) Name() string { return "proto" }

// proxied opens a store behind a proxy: each request passes once gate returns without an error.
func proxied(t *testing.T, gate func(method string, request []byte) error) (direct, behind *store.Etcd) {
	t.Helper()
	port := func() (net.Listener, string) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l, l.Addr().String()
	}
	l, at := port()
	l.Close()
	direct, err := store.Open(t.Context(), store.Embedded{Dir: t.TempDir(), Prefix: "/lariat/v1/",
		ListenClient: "http://" + at, Log: testLog()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { direct.Close() })
	conn, err := grpc.NewClient(at, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{}), grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	pass := func(_ any, up grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(up)
		ctx, cancel := context.WithCancel(up.Context())
		defer cancel()
		md, _ := grpcmeta.FromIncomingContext(ctx)
		both := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
		down, err := conn.NewStream(grpcmeta.NewOutgoingContext(ctx, md), both, method)
		if err != nil {
			return err
		}
		var refused atomic.Bool
		go func() {
			for {
				var f frame
				if up.RecvMsg(&f) != nil {
					_ = down.CloseSend()
					return
				}
				if refused.Store(gate(method, f) != nil); refused.Load() || down.SendMsg(&f) != nil {
					cancel()
					return
				}
			}
		}()
		for {
			var f frame
			if err := down.RecvMsg(&f); err == io.EOF { //nolint:errorlint // gRPC says so itself
				return nil
			} else if refused.Load() {
				return status.Error(codes.Aborted, "too late") // one that etcd's client does not hide by a try of its own
			} else if err != nil {
				return err
			}
			if err := up.SendMsg(&f); err != nil {
				return err
			}
		}
	}
	proxy := grpc.NewServer(grpc.ForceServerCodec(raw{}), grpc.MaxSendMsgSize(1<<30), grpc.UnknownServiceHandler(pass))
	pl, pat := port()
	go proxy.Serve(pl) //nolint:errcheck // it ends with the test
	t.Cleanup(proxy.Stop)
	behind, err = store.Dial(t.Context(), store.External{Endpoints: []string{"http://" + pat},
		Prefix: "/lariat/v1/", Log: testLog()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { behind.Close() })
	return direct, behind
}

// fill writes objects as other hosts would.
func fill(t testing.TB, st store.Store, objects map[string]any) {
	t.Helper()
	var changes []store.Change
	for key, o := range objects {
		data, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		changes = append(changes, store.Change{Key: key, Value: data})
	}
	for _, r := range st.Write(t.Context(), changes...) {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
}

// big is a view of many hosts and blocks.
func big(network string, hosts, blocks int) map[string]any {
	out := map[string]any{}
	for i := range hosts {
		h := metadata.Host{Name: fmt.Sprintf("other%05d", i), Underlay: []metadata.Underlay{
			{Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), 12), Device: "eth0",
				MTU: 1500}}}
		out[entry.HostPrefix+h.Name] = h
	}
	for i := range blocks {
		at := i << 6
		b := metadata.Block{Network: network,
			CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(at >> 16), byte(at >> 8), byte(at)}), 26),
			Host: fmt.Sprintf("other%05d", i%hosts)}
		out[entry.BlockPrefix+metadata.BlockKey(b)] = b
	}
	return out
}

// TestAViewIsReadOnWhereItStopped: with many hosts that read at once, a page may come too late. It
// alone is asked for again, not those before it.
func TestAViewIsReadOnWhereItStopped(t *testing.T) {
	var mu sync.Mutex
	late := map[string]bool{}
	asked := 0
	direct, behind := proxied(t, func(method string, request []byte) error {
		var r pb.RangeRequest
		if method != pb.KV_Range_FullMethodName || protoCodec.Unmarshal(mem.BufferSlice{mem.SliceBuffer(request)},
			&r) != nil || !strings.Contains(string(r.Key), "/view/blocks/big/") {
			return nil // of the pages those that begin amid the blocks
		}
		mu.Lock()
		asked++
		first := !late[string(r.Key)]
		late[string(r.Key)] = true
		mu.Unlock()
		if first {
			return errors.New("too late")
		}
		return nil
	})
	const blocks = 30_000
	n := overlay("10.0.0.0/8")
	n.Name, n.Encapsulation = "big", metadata.EncapNone
	objects := big("big", 1, blocks)
	objects[entry.NetworkPrefix+"big"] = n
	fill(t, direct, objects)
	s, err := New(t.Context(), hostConfig("a", "192.0.2.1/24"), behind)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := len(s.view.Blocks("big", func(metadata.Block) bool { return true })); got != blocks {
		t.Errorf("%d of %d blocks are known", got, blocks)
	}
	mu.Lock()
	defer mu.Unlock()
	if pages := len(late); asked != 2*pages || pages < 3 {
		t.Errorf("%d pages, each late once, were asked for %d times, want twice each", pages, asked)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
