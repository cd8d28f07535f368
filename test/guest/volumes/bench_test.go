package volumes_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// What the volume doors cost, "make bench/volumes". The machine is emulated: only what stands side by side can be compared.

// BenchmarkDriver mounts and unmounts an export by the driver, as kubelet calls it, and by mount(8) and umount(8).
func BenchmarkDriver(b *testing.B) {
	nfsd.Serve(b)
	dir := b.TempDir()
	json := options("name", "bench", "host", server, "export", export, "mntOptions", "vers=4.2")
	driver := func(args ...string) {
		if out, err := command(nil, args...).CombinedOutput(); err != nil {
			b.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	program := func(args ...string) {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			b.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	var took [4]time.Duration // mount and unmount by the driver, and by the programs
	timed := func(i int, f func(...string), args ...string) {
		start := time.Now()
		f(args...)
		took[i] += time.Since(start)
	}
	n := 0
	for b.Loop() {
		timed(0, driver, "mount", dir, json)
		timed(1, driver, "unmount", dir)
		timed(2, program, "mount", "-t", "nfs", "-o", "vers=4.2,nosuid,nodev,rw", server+":"+export, dir)
		timed(3, program, "umount", dir)
		n++
	}
	for i, name := range []string{"mount-ms", "unmount-ms", "mount(8)-ms", "umount(8)-ms"} {
		b.ReportMetric(took[i].Seconds()*1000/float64(n), name)
	}
	b.ReportMetric((took[0]+took[1]-took[2]-took[3]).Seconds()*1000/float64(2*n), "more-ms/call")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDocker has Docker's four calls for a volume's life, one life at a time and twenty at once, with a thousand other volumes in the journal; and
// what is left of these without a plugin, as in Docker's own driver "local" for NFS: mkdir, mount(2), umount(2), rmdir.
func BenchmarkDocker(b *testing.B) {
	nfsd.Serve(b)
	bin := filepath.Join(os.Getenv("LARIAT_BIN"), "lariat-storage")
	if !exists(bin) {
		b.Skip("bin/lariat-storage is not built: make build")
	}
	s := startStorage(b, bin, "--log-level", "warn")
	opts := map[string]string{"host": server, "export": export, "mntOptions": "vers=4.2"}
	do := func(verb, name string) {
		if _, err := s.call(b, verb, name, "id", opts); err != "" {
			b.Errorf("%s of %s: %s", verb, name, err)
		}
	}
	const others = 1000
	for i := range others {
		do("Create", fmt.Sprint("other-", i))
	}
	plugin := func(name string) {
		for _, verb := range []string{"Create", "Mount", "Unmount", "Remove"} {
			do(verb, name)
		}
	}
	base := b.TempDir()
	local := func(name string) {
		dir := filepath.Join(base, name)
		for _, step := range []func() error{
			func() error { return os.Mkdir(dir, 0o755) },
			func() error {
				return unix.Mount(server+":"+export, dir, "nfs4", unix.MS_NOSUID|unix.MS_NODEV, "vers=4.2,addr="+server)
			},
			func() error { return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW) },
			func() error { return os.Remove(dir) },
		} {
			if err := step(); err != nil {
				b.Errorf("%s: %v", name, err)
			}
		}
	}
	for _, atOnce := range []int{1, 20} {
		for _, kind := range []struct {
			name string
			life func(string)
		}{{"lariat-storage", plugin}, {"local", local}} {
			b.Run(fmt.Sprintf("%s/%d-at-once", kind.name, atOnce), func(b *testing.B) {
				var lives atomic.Int64
				start := time.Now()
				for b.Loop() {
					var wg sync.WaitGroup
					for i := range atOnce {
						wg.Go(func() { kind.life(fmt.Sprintf("life-%d", i)); lives.Add(1) })
					}
					wg.Wait()
				}
				b.ReportMetric(float64(lives.Load())/time.Since(start).Seconds(), "lives/s")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
