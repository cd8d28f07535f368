// Package xfrmi_test runs in a guest whose kernel lacks XFRM interfaces.
package xfrmi_test

import (
	"testing"

	"github.com/lariat-net/lariat/test/guest/without"
)

func TestMain(m *testing.M) { without.Main(m, "xfrm_interface") }

func TestF145_ADDIsRefusedWithoutXFRMInterfaces(t *testing.T) {
	without.ADDIsRefused(t, "xfrmi", "xfrm_interface")
}
