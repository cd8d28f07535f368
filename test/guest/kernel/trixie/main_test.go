// Package trixie_test runs those tests of pkg/kernel in Debian 13's kernel that depend on the kernel's version.
package trixie_test

import (
	"testing"

	"github.com/lariat-net/lariat/test/guest"
)

func TestMain(m *testing.M) {
	guest.Main(m, guest.Options{Package: "../../../../pkg/kernel", Only: "FirstPackets", Kernel: "trixie"})
}
