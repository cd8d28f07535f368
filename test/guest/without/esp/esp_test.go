// Package esp_test runs in a guest whose kernel lacks ESP.
package esp_test

import (
	"testing"

	"github.com/lariat-net/lariat/test/guest/without"
)

func TestMain(m *testing.M) { without.Main(m, "esp4,esp6") }

func TestF145_ADDIsRefusedWithoutESP(t *testing.T) { without.ADDIsRefused(t, "esp", "esp4") }
