package volumes_test

import (
	"os/exec"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// BenchmarkDriver mounts and unmounts an export by the driver, as kubelet calls it, and by mount(8) and
// umount(8). It is part of "make bench/volumes". The machine is emulated: only what stands side by side can
// be compared.
func BenchmarkDriver(b *testing.B) {
	nfsd.Serve(b)
	dir := b.TempDir()
	json := options("name", "bench", "host", server, "export", export, "mntOptions", "vers=4.2")
	byDriver := func(args ...string) {
		if out, err := driver.Command(nil, args...).CombinedOutput(); err != nil {
			b.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	byProgram := func(args ...string) {
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
		timed(0, byDriver, "mount", dir, json)
		timed(1, byDriver, "unmount", dir)
		timed(2, byProgram, "mount", "-t", "nfs", "-o", "vers=4.2,nosuid,nodev,rw", server+":"+export, dir)
		timed(3, byProgram, "umount", dir)
		n++
	}
	for i, name := range []string{"mount-ms", "unmount-ms", "mount(8)-ms", "umount(8)-ms"} {
		b.ReportMetric(took[i].Seconds()*1000/float64(n), name)
	}
	b.ReportMetric((took[0]+took[1]-took[2]-took[3]).Seconds()*1000/float64(2*n), "more-ms/call")
	b.ReportMetric(0, "ns/op")
}
