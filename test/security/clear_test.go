package security_test

import (
	"net/netip"

	. "github.com/onsi/ginkgo/v2"
)

func clear(one world)          {}
func advertisements(one world) {}
func spoofing(one world)       {}
func devices(one world)        {}
func redirection(one world)    {}

var _ = It
var _ netip.Addr
