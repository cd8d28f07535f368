package reconcile

import "github.com/lariat-net/lariat/pkg/plan"

// Desired is plan.Desired.
var Desired = plan.Desired
