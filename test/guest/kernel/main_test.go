// Package kernel_test runs those tests of pkg/kernel in a guest that skip on a machine whose kernel has no
// ESP or XFRM interfaces, and those that depend on the kernel's version: in that of the machine's release of
// Debian. The folder trixie has the latter in a second kernel.
//
// They are told by their names. The others run where pkg/kernel's tests run; -run '.*' runs them here, in
// Linux 6.1 and slowly.
package kernel_test

import (
	"testing"

	"github.com/lariat-net/lariat/test/guest"
)

func TestMain(m *testing.M) {
	guest.Main(m, guest.Options{Package: "../../../pkg/kernel", Only: "XFRM|Xfrm|ESP|IPsec|FirstPackets", Warm: true})
}
