package efs

import (
	"errors"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
)

// F106: what the options mean.
func TestF106Options(t *testing.T) {
	const recommendedRW = "nosuid,nodev,retry=0,nfsvers=4.1,rsize=1048576,wsize=1048576," +
		"hard,timeo=600,retrans=2,noresvport,rw"
	for _, tc := range []struct {
		name    string
		options options
		says    string // Volume.String
		mount   string
		tls     bool
	}{
		{"its own", options{}, "a file system of its own", recommendedRW, false},
		{"a file system", options{"fsid": "fs-0123456789abcdef0", "export": "/data"}, "fs-0123456789abcdef0:/data",
			recommendedRW, false},
		{"an access point", options{"fsid": "fs-01234567", "accessPoint": "fsap-01234567"},
			"fs-01234567 by access point fsap-01234567", recommendedRW, true},
		{"an address in brackets", options{"mountTargetIp": "[fd00::1]"}, "fd00::1", recommendedRW, false},
		{"a folder", options{"fsid": "fs-01234567", "basePath": "/"}, "fs-01234567:/v by an access point of its own",
			recommendedRW, true},
		{"an address", options{"mountTargetIp": "10.0.0.1", "readOnly": "true"}, "10.0.0.1", strings.TrimSuffix(recommendedRW,
			"rw") + "ro", false},
		{"iam", options{"fsid": "fs-01234567", "iam": "true"}, "fs-01234567", recommendedRW, true},
		{"its own mount options", options{"mntOptions": "soft,timeo=50,nconnect=4"}, "a file system of its own",
			"nosuid,nodev,retry=0,nfsvers=4.1,rsize=1048576,wsize=1048576,retrans=2,noresvport,soft,timeo=50,nconnect=4,rw",
			false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v, err := ParseVolume(volume.Request{Name: "v", Options: tc.options})
			if err != nil {
				t.Fatal(err)
			}
			if v.String() != tc.says || strings.Join(v.Mount.Options, ",") != tc.mount || v.TLS != tc.tls {
				t.Errorf("%s %s %v", v, strings.Join(v.Mount.Options, ","), v.TLS)
			}
		})
	}
}

// F109: what is refused, with nothing asked of anybody.
func TestF109Refused(t *testing.T) {
	const fs = "fs-01234567"
	for _, o := range []options{
		{"fsid": "-o"}, {"fsid": "fs-XYZ"}, {"fsid": "fs-0123456"}, {"fsid": "fs-01234567,x"},
		{"accessPoint": "fsap-01234567"}, {"fsid": fs, "accessPoint": "fs-01234567"},
		{"fsid": fs, "accessPoint": "fsap-01234567", "basePath": "/"}, {"basePath": "/a"},
		{"fsid": fs, "basePath": "/a/../b"}, {"fsid": fs, "basePath": "a"},
		{"fsid": fs, "basePath": "/a/b/c/d/e"}, {"fsid": fs, "basePath": "/a/b/c/d"}, {"fsid": fs, "basePath": "/.hidden"},
		{"fsid": fs, "basePath": "/a/.b"},
		{"fsid": fs, "basePath": "/a$b"}, {"fsid": fs, "basePath": "/a#"}, {"fsid": fs, "basePath": "/a`b`"},
		{"fsid": fs, "basePath": "/{a}"}, {"fsid": fs, "basePath": "/a*"}, {"fsid": fs, "basePath": "/" + strings.Repeat("a",
			99)},
		{"fsid": fs, "basePath": "/", "uid": "1"}, {"uid": "1", "gid": "1"},
		{"fsid": fs, "basePath": "/", "directoryPerms": "999"}, {"fsid": fs, "basePath": "/", "tls": "false"},
		{"iam": "true", "tls": "false"}, {"tls": "maybe"},
		{"mountTargetIp": "host"}, {"mountTargetIp": "fe80::1%eth0"}, {"mountTargetIp": "10.0.0.1", "tls": "true"},
		{"region": "a.b/c"}, {"region": "eu west"},
		{"subnets": "subnet-1,sg-1"}, {"securityGroups": "0.0.0.0/0"}, {"export": "/a/../b"}, {"export": "x"},
		{"onRemove": "archive"}, {"onHang": "wait"},
		{"performanceMode": "fast"}, {"throughputMode": "fast"}, {"throughputMode": "provisioned"},
		{"provisionedThroughput": "5"}, {"kmsKeyId": "a b"}, {"kmsKeyId": "k", "encrypted": "false"},
		{"tags": "x"}, {"tags": "=x"}, {"tags": "aws:x=y"}, {"tags": "lariat:volume=other"}, {"tags": "Name=x"},
		{"tags": "a=1,a=2"},
		{"mntOptions": "suid"}, {"mntOptions": "vers=3"}, {"mntOptions": "vers=4.2"}, {"mntOptions": "proto=udp"},
		{"mntOptions": "sec=krb5"}, {"mntOptions": "bind"}, {"mntOptions": "tls"},
		{"mntOptions": "accesspoint=fsap-01234567"}, {"fsId": fs}, {"export": "/a\nb"},
	} {
		if _, err := ParseVolume(volume.Request{Name: "v", Options: o}); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%v: %v", o, err)
		}
	}
	for _, name := range []string{"", "../x", "-o", "a/b", "a\nb"} {
		if _, err := ParseVolume(volume.Request{Name: name}); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// FuzzUnderstand: whatever is accepted is one word each for mount.efs.
func FuzzUnderstand(f *testing.F) {
	f.Add("v", "fs-01234567", "/e", "/b", "ro", "10.0.0.1", "eu-central-1")
	f.Add("../x", "-o", "e,x", "", "suid", "", "")
	f.Fuzz(func(t *testing.T, name, fsid, export, base, mnt, ip, region string) {
		o := options{"fsid": fsid, "export": export, "mntOptions": mnt, "mountTargetIp": ip, "region": region}
		if base != "" {
			o["basePath"] = base
		}
		v, err := ParseVolume(volume.Request{Name: name, Options: o})
		if err != nil {
			if !errors.Is(err, volume.ErrInvalid) {
				t.Error(err)
			}
			return
		}
		m := v.Mount
		m.Host = v.Address
		for _, word := range v.through(m, v.FileSystem, v.AccessPoint).Options {
			if strings.ContainsAny(word, ", \n\x00") {
				t.Errorf("option %q", word)
			}
		}
	})
}
