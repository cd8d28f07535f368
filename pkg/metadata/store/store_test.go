package store

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

func open(t testing.TB, dir string) *Etcd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := Open(ctx, Embedded{Dir: dir, Prefix: "/lariat/v1/"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestConditionalWrites(t *testing.T) {
	ctx := t.Context()
	start := time.Now()
	s := open(t, t.TempDir())
	t.Logf("opened in %v", time.Since(start))
	defer s.Close()
	r1, err := One(ctx, s, Change{Key: "a", Value: []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := One(ctx, s, Change{Key: "a", Value: []byte("2")}); !errors.Is(err, ErrConflict) {
		t.Fatalf("created twice: %v", err)
	}
	res := s.Write(ctx, Change{Key: "a", Value: []byte("2"), Revision: r1 + 100}, Change{Key: "b", Value: []byte("1")})
	if !errors.Is(res[0].Err, ErrConflict) || res[1].Err != nil {
		t.Fatalf("one failed condition must stop only its own change: %+v", res)
	}
	e, err := s.Get(ctx, "a")
	if err != nil || string(e.Value) != "1" || e.Revision != r1 {
		t.Fatalf("%+v %v", e, err)
	}
	start = time.Now()
	for i := range 200 {
		One(ctx, s, Change{Key: fmt.Sprint("k", i), Value: make([]byte, 4000)})
	}
	t.Logf("%v per write", time.Since(start)/200)
	list, rev, err := s.List(ctx, "k")
	if err != nil || len(list) != 200 || rev == 0 {
		t.Fatal(len(list), rev, err)
	}
}
