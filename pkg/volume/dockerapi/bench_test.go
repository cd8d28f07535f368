package dockerapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
)

// local is the least that a driver of folders does: it makes them and mounts them elsewhere.
type local struct {
	volume.Unsupported
	base string
}

func (l local) path(name string) string { return filepath.Join(l.base, name) }

func (l local) Init(context.Context) (volume.Capabilities, error) { return volume.Capabilities{}, nil }

func (l local) Create(_ context.Context, r volume.Request) (volume.Reply, error) {
	return volume.Reply{}, os.MkdirAll(l.path(r.Name), 0o755)
}

func (l local) Delete(_ context.Context, r volume.Request) (volume.Reply, error) {
	return volume.Reply{}, os.RemoveAll(l.path(r.Name))
}

func (l local) Mount(_ context.Context, dir, _ string, r volume.Request) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return unix.Mount(l.path(r.Name), dir, "", unix.MS_BIND, "")
}

func (l local) Unmount(_ context.Context, dir string) error {
	return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
}

// BenchmarkLives has Docker's four calls for the life of a volume (create, mount, unmount, remove), over the
// socket, with a thousand other volumes in the journal; and the same driver without what lies between: no
// socket, no journal, no counts. It is part of "make bench/volumes" and needs root to mount.
func BenchmarkLives(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: it mounts")
	}
	dir := b.TempDir()
	driver := local{base: filepath.Join(dir, "data")}
	s, err := New(Config{Driver: driver, Name: "local", Scope: "local", StateDir: filepath.Join(dir, "state"),
		MountDir: filepath.Join(dir, "mounts")})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	go server.Serve(l) //nolint:errcheck // it ends by Close
	defer server.Close()
	client := http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 20,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
	call := func(verb, name string) {
		r, err := client.Post("http://x/VolumeDriver."+verb, mediaType,
			strings.NewReader(fmt.Sprintf(`{"Name":%q,"ID":"id"}`, name)))
		if err != nil {
			b.Error(err)
			return
		}
		defer r.Body.Close()
		var a answer
		if err := json.NewDecoder(r.Body).Decode(&a); err != nil || a.Err != "" {
			b.Errorf("%s: %v %s", verb, err, a.Err)
		}
	}
	const others = 1000
	for i := range others {
		call("Create", fmt.Sprint("other-", i))
	}
	docker := func(name string) {
		for _, verb := range []string{"Create", "Mount", "Unmount", "Remove"} {
			call(verb, name)
		}
	}
	alone := func(name string) {
		at, r := filepath.Join(dir, "alone", name), volume.Request{Name: name}
		for _, step := range []func() error{
			func() error { _, err := driver.Create(b.Context(), r); return err },
			func() error { return driver.Mount(b.Context(), at, "", r) },
			func() error { return driver.Unmount(b.Context(), at) },
			func() error { _, err := driver.Delete(b.Context(), r); return err },
		} {
			if err := step(); err != nil {
				b.Error(err)
			}
		}
	}
	for _, atOnce := range []int{1, 20} {
		for _, kind := range []struct {
			name string
			life func(string)
		}{{"docker", docker}, {"alone", alone}} {
			b.Run(fmt.Sprintf("%s/%d-at-once", kind.name, atOnce), func(b *testing.B) {
				var wg sync.WaitGroup
				names := make(chan string)
				for range atOnce {
					wg.Go(func() {
						for name := range names {
							kind.life(name)
						}
					})
				}
				for i := range b.N {
					names <- fmt.Sprint("life-", i)
				}
				close(names)
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lives/s")
			})
		}
	}
}
