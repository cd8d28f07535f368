package nfs

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
)

func TestMain(m *testing.M) {
	os.Exit(m.Run())
}

// F105: what the options mean.
func TestF105Volume(t *testing.T) {
	type m = map[string]string
	group := int64(7)
	rancher := Config{Server: "nfs.example.com", Base: "/vols", MountOpts: "nfsvers=4,suid,hard", OnRemove: Purge}
	for _, tc := range []struct {
		name    string
		config  Config
		options m
		source  string
		mount   string
		want    Volume // of it OnRemove, OnHang, Base
	}{
		{"an export", Config{}, m{"host": "10.0.0.1", "export": "/srv/a"}, "10.0.0.1:/srv/a", "nosuid,nodev,retry=0,rw",
			Volume{OnRemove: Retain, OnHang: Force}},
		{"an address of IPv6", Config{}, m{"host": "fd00::1", "export": "/"}, "[fd00::1]:/", "nosuid,nodev,retry=0,rw",
			Volume{OnRemove: Retain, OnHang: Force}},
		{"an address of IPv6 in brackets, with its interface", Config{}, m{"host": "[fe80::1%eth0]", "export": "/srv/"},
			"[fe80::1%eth0]:/srv", "nosuid,nodev,retry=0,rw", Volume{OnRemove: Retain, OnHang: Force}},
		{"what people copy from fstab", Config{Server: "[fd00::2]", Base: "/b/"},
			m{"mntOptions": "defaults,_netdev,nofail,bg,intr,vers=4,minorversion=1"}, "[fd00::2]:/b/v",
			"nosuid,nodev,retry=0,vers=4.1,rw", Volume{OnRemove: Retain, OnHang: Force, Base: "/b"}},
		{"a minor version alone", Config{MountOpts: "nfsvers=4.2"},
			m{"host": "h", "export": "/", "mntOptions": "minorversion=0"}, "h:/", "nosuid,nodev,retry=0,vers=4.0,rw",
			Volume{OnRemove: Retain, OnHang: Force}},
		{"a folder", Config{}, m{"host": "h", "exportBase": "/srv", "onRemove": "archive", "onHang": "lazy"}, "h:/srv/v",
			"nosuid,nodev,retry=0,rw", Volume{OnRemove: Archive, OnHang: Lazy, Base: "/srv"}},
		{"a folder of the root", Config{}, m{"host": "h", "exportBase": "/"}, "h:/v", "nosuid,nodev,retry=0,rw",
			Volume{OnRemove: Retain, OnHang: Force, Base: "/"}},
		{"the environment's", rancher, nil, "nfs.example.com:/vols/v", "nodev,retry=0,nfsvers=4,suid,hard,rw",
			Volume{OnRemove: Purge, OnHang: Force, Base: "/vols"}},
		{"its own options win", rancher, m{"mntOptions": "vers=3, soft,nosuid,ro"}, "nfs.example.com:/vols/v",
			"nodev,retry=0,vers=3,soft,nosuid,ro", Volume{OnRemove: Purge, OnHang: Force, Base: "/vols", ReadOnly: true}},
		{"its own export on the environment's server is never purged", rancher, m{"export": "/a"}, "nfs.example.com:/a",
			"nodev,retry=0,nfsvers=4,suid,hard,rw", Volume{OnRemove: Retain, OnHang: Force}},
		{"read-only wins over rw", Config{}, m{"host": "h", "export": "/", "readOnly": "true", "mntOptions": "rw"}, "h:/",
			"nosuid,nodev,retry=0,ro", Volume{OnRemove: Retain, OnHang: Force, ReadOnly: true}},
		{"a group", Config{}, m{"host": "h", "exportBase": "/b", "fsGroup": "7"}, "h:/b/v", "nosuid,nodev,retry=0,rw",
			Volume{OnRemove: Retain, OnHang: Force, Base: "/b", FSGroup: &group}},
		{"what Rancher gives back", Config{}, m{"host": "h", "export": "/b", "created": "true", "name": "v",
			"onRemove": "retain"}, "h:/b", "nosuid,nodev,retry=0,rw", Volume{OnRemove: Retain, OnHang: Force}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v, err := tc.config.Volume(volume.Request{Name: "v", Options: tc.options})
			if err != nil {
				t.Fatal(err)
			}
			if v.Source() != tc.source || strings.Join(v.Options, ",") != tc.mount {
				t.Errorf("got  %s %s\nwant %s %s", v.Source(), strings.Join(v.Options, ","), tc.source, tc.mount)
			}
			got := Volume{OnRemove: v.OnRemove, OnHang: v.OnHang, Base: v.Base, ReadOnly: v.ReadOnly, FSGroup: v.FSGroup}
			if !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got  %+v\nwant %+v", got, tc.want)
			}
		})
	}
}

// F105, F109: what is refused.
func TestF105F109Refused(t *testing.T) {
	for _, options := range []string{"suid", "dev", "exec", "nosuid,suid", "sec=none", "sec=sys:krb5", "sec=none,foo",
		"foo", "bind", "remount", "move", "vers=3,minorversion=1", "vers=4.2,minorversion=1", "minorversion=3", "bg=1",
		"defaults=", "context=x", "helper=/bin/sh", "addr=1.2.3.4", "mounthost=x",
		"clientaddr=x", "vers", "vers=", "vers=2", "vers=4.9", "ro=1", "timeo=-1", "timeo=+1", "timeo=0x1",
		"timeo=99999999999999999999", "port=0", "port=70000", "=", "=x", "Ro", "nconnect=17", "user", "x-systemd.automount",
		"a b"} {
		_, err := (Config{}).Volume(volume.Request{Name: "v", Options: map[string]string{"host": "h", "export": "/e",
			"mntOptions": options}})
		if !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("mntOptions %q: %v", options, err)
		}
	}
	// All wrong words at once.
	_, err := (Config{}).Volume(volume.Request{Name: "v", Options: map[string]string{"host": "h", "export": "/e",
		"mntOptions": "foo,ro,retry=x,suid"}})
	if want := `mntOptions: "foo" is not among the mount options that are allowed; "retry=x" does not have a value that is allowed; suid is allowed only in the administrator's MOUNT_OPTS`; err == nil || err.Error() != want {
		t.Errorf("%v", err)
	}
	for _, host := range []string{"-o", "a b", "a,b", "a:b", "a/b", "fd00::1%eth0", "fe80::1%eth0/1", "fe80::1%",
		"fe80::1%a,b", "[fe80::1", "[h]", "[1.2.3.4]", ".", "a..b", "-", "a-", strings.Repeat("a.", 200), "h\n"} {
		_, err := (Config{}).Volume(volume.Request{Name: "v", Options: map[string]string{"host": host, "export": "/e"}})
		if !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("host %q: %v", host, err)
		}
	}
	for _, p := range []string{"e", "/e//", "/e//f", "/e/../f", "/..", "/e/.", "/e\n", "/" + strings.Repeat("e", 2000)} {
		for _, key := range []string{"export", "exportBase"} {
			if _, err := (Config{}).Volume(volume.Request{Name: "v",
				Options: map[string]string{"host": "h", key: p}}); !errors.Is(err, volume.ErrInvalid) {
				t.Errorf("%s %q: %v", key, p, err)
			}
		}
	}
	if _, err := (Config{Server: "a", Base: "/b"}).Volume(volume.Request{Name: "v",
		Options: map[string]string{"host": "other"}}); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("MOUNT_DIR on another server than NFS_SERVER: %v", err)
	}
}

// FuzzVolume: whatever is accepted is one word each for mount.nfs, and below the base.
func FuzzVolume(f *testing.F) {
	f.Add("v", "h", "/e", "ro,vers=4.1", "purge")
	f.Add("../x", "-o", "/e/..", "suid", "")
	f.Fuzz(func(t *testing.T, name, host, base, mnt, remove string) {
		options := map[string]string{"host": host, "exportBase": base, "mntOptions": mnt}
		if remove != "" {
			options["onRemove"] = remove
		}
		v, err := (Config{}).Volume(volume.Request{Name: name, Options: options})
		if err != nil {
			if !errors.Is(err, volume.ErrInvalid) {
				t.Errorf("%v", err)
			}
			return
		}
		if filepath.Dir(v.Path) != v.Base || strings.HasPrefix(v.Source(), "-") || strings.ContainsAny(v.Source(), "\n\x00") {
			t.Errorf("%+v", v)
		}
		for _, o := range v.Options {
			key, _, _ := strings.Cut(o, "=")
			if r, ok := rules[key]; !ok || r.Admin || strings.ContainsAny(o, ", \n") {
				t.Errorf("option %q", o)
			}
		}
	})
}
