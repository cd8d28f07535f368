package nfs

import (
	"context"
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
)

// F159: of several addresses the one that answers is taken, wherever it is among them.
func TestF159Race(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.3:0")
	if err != nil {
		t.Skip(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	refusing := "127.0.0.4" // where nobody listens
	for _, addrs := range [][]string{
		{"127.0.0.3"}, {refusing, "127.0.0.3"}, {"127.0.0.3", refusing}, {refusing, refusing, refusing, "127.0.0.3"},
	} {
		if got, errs := race(t.Context(), addrs, port); got != "127.0.0.3" {
			t.Errorf("%v: %q %v", addrs, got, errs)
		}
	}
	if got, errs := race(t.Context(), []string{refusing, refusing}, port); got != "" || len(errs) != 2 ||
		!errors.Is(errs[1], syscall.ECONNREFUSED) {
		t.Errorf("%q %v", got, errs)
	}
}

// F159: the message names the addresses, and what each did.
func TestF159Silent(t *testing.T) {
	refused, late, odd := error(syscall.ECONNREFUSED), context.DeadlineExceeded, error(syscall.EHOSTUNREACH)
	for _, tc := range []struct {
		errs []error
		want string
		late bool
	}{
		{[]error{refused}, "NFS server h:2049 refuses connections: is nfsd running there?", false},
		{[]error{late}, "NFS server h:2049 does not answer: is the host up, and no firewall between?", true},
		{[]error{odd}, "NFS server h:2049: no route to host", false},
		{[]error{late, late}, "NFS server h:2049 (a0, a1) does not answer: is the host up, and no firewall between?", true},
		{[]error{refused, refused}, "NFS server h:2049 (a0, a1) refuses connections: is nfsd running there?", false},
		{[]error{late, refused, odd}, "NFS server h:2049 has no address that answers: a0: does not answer; a1: refuses " +
			"connections; a2: no route to host", true},
	} {
		err := silent("h:2049", []string{"a0", "a1", "a2"}[:len(tc.errs)], tc.errs)
		if err.Error() != tc.want || errors.Is(err, context.DeadlineExceeded) != tc.late {
			t.Errorf("got  %v\nwant %s", err, tc.want)
		}
	}
}

// F159: how a program or the kernel is told which address answered; and which kind of addresses an option asks for.
func TestF159Spec(t *testing.T) {
	options := map[string]string{"host": "h", "export": "/e", "mntOptions": "vers=4.1"}
	v, err := (Config{}).Volume(volume.Request{Name: "v", Options: options})
	if err != nil {
		t.Fatal(err)
	}
	for _, several := range []bool{false, true} {
		s := v.spec("/d", server{"10.0.0.2", several})
		if s.Source != "h:/e" || s.Address != "10.0.0.2" || s.Pinned != several {
			t.Errorf("%+v", s)
		}
		efs := v
		efs.Through = &Through{FSType: "efs", Source: "fs-1:/e", Options: []string{"tls"}, Pin: "mounttargetip"}
		want := map[bool]string{false: "tls", true: "tls,mounttargetip=10.0.0.2"}[several]
		if s := efs.spec("/d", server{"10.0.0.2", several}); strings.Join(s.Options, ",") != want || s.Pinned {
			t.Errorf("%+v", s)
		}
	}
	for options, want := range map[string]string{
		"": "ip 2049", "tcp": "ip 2049", "proto=tcp": "ip4 2049", "proto=tcp6,port=20490": "ip6 20490",
		"udp": "ip ", "proto=udp6": "ip6 ", "proto=rdma": "ip4 ",
	} {
		own, err := parse("mntOptions", options, false)
		if err != nil {
			t.Fatal(err)
		}
		network, port := Volume{Options: own}.dialed()
		if got := network + " " + port; got != want {
			t.Errorf("%s: %q, want %q", options, got, want)
		}
	}
}
