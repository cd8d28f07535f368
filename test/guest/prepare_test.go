package guest

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/debian"
)

// TestSweepKeepsWhatIsOfUse: of images this one, the newest other one, for a checkout of another branch, and
// those that guests run from.
func TestSweepKeepsWhatIsOfUse(t *testing.T) {
	cache := t.TempDir()
	for i, name := range []string{"image-a-1", "image-a-2", "image-b-1", "image-c-1"} {
		write(t, filepath.Join(cache, name, "packages"), time.Unix(int64(1000+i), 0))
	}
	write(t, filepath.Join(cache, "making-1", "root"), time.Unix(1, 0))
	write(t, filepath.Join(cache, "debs", "wanted_1_all.deb"), time.Unix(1, 0))
	write(t, filepath.Join(cache, "debs", "old_1_all.deb"), time.Unix(1, 0))
	unlock, err := lock(filepath.Join(cache, "image-a-1.lock"), syscall.LOCK_SH) // as a guest does
	if err != nil {
		t.Fatal(err)
	}
	p := preparation{cache: cache, guest: []debian.Package{{Name: "wanted", Version: "1", File: "wanted_1_all.deb"}}}
	current := Image{dir: filepath.Join(cache, "image-c-1")}
	left := func() (names []string) {
		for _, pattern := range []string{"debs/*", "image-*-?", "making-*"} {
			for _, path := range glob(cache, pattern) {
				names = append(names, filepath.Base(path))
			}
		}
		return names
	}

	p.sweep(current)
	if got, want := left(), []string{"wanted_1_all.deb", "image-a-1", "image-b-1", "image-c-1"}; !slices.Equal(got, want) {
		t.Errorf("left are %v, want %v", got, want)
	}
	unlock()
	p.sweep(current)
	if got, want := left(), []string{"wanted_1_all.deb", "image-b-1", "image-c-1"}; !slices.Equal(got, want) {
		t.Errorf("without the guest, left are %v, want %v", got, want)
	}
}

func write(t *testing.T, path string, at time.Time) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
}

// TestFindTakesTheNewestOfItsRecipe also shows that an image of another recipe is none.
func TestFindTakesTheNewestOfItsRecipe(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("LARIAT_GUEST_CACHE", cache)
	write(t, filepath.Join(cache, "image-0000000000-1", "packages"), time.Unix(3000, 0))
	write(t, filepath.Join(cache, "image-"+recipe()+"-3.lock"), time.Unix(3000, 0))
	if image, err := Find(); err == nil {
		t.Errorf("found %s, which is none of this recipe", image.dir)
	}
	write(t, filepath.Join(cache, "image-"+recipe()+"-2", "packages"), time.Unix(2000, 0))
	write(t, filepath.Join(cache, "image-"+recipe()+"-1", "packages"), time.Unix(1000, 0))
	write(t, filepath.Join(cache, "image-"+recipe()+"-1.lock"), time.Unix(4000, 0))
	image, err := Find()
	if err != nil || filepath.Base(image.dir) != "image-"+recipe()+"-2" {
		t.Errorf("found %s, %v", image.dir, err)
	}
}
