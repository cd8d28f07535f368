package main

import (
	"context"
	"strings"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/overlay"
	"github.com/lariat-net/lariat/pkg/probe"
)

// ready asks the network manager, which keeps the tunnels and has probed the kernel. When the
// manager does not answer, ready probes the kernel itself. A container on a host that cannot
// encrypt would be cut off from the others for good, while a manager comes back.
func ready(ctx context.Context, managerSocket string) error {
	var r ipsec.Report
	if err := overlay.ManagerClient(managerSocket).Do(ctx, "GET", "/v1/tunnels?summary=1", nil, &r); err != nil {
		for _, f := range []probe.Feature{probe.XfrmInterface, probe.ESP} {
			if err := probe.Check(f); err != nil {
				return cni.Errorf(cni.ErrNotAvailable, "this host cannot encrypt: %w", err)
			}
		}
		return cni.Errorf(cni.ErrLimited, "the network manager does not answer, so nobody keeps the tunnels to other "+
			"hosts: %w", err).
			WithDetails("check: systemctl status lariat-network-manager")
	}
	switch {
	case r.Missing != "":
		return cni.Errorf(cni.ErrNotAvailable, "this host cannot encrypt: %s",
			strings.ReplaceAll(r.Missing, "\n", "; ")).WithDetails("%s", r.Remedy)
	case r.Problem != "":
		return cni.Errorf(cni.ErrLimited, "tunnels to other hosts: %s", r.Problem).WithDetails("%s", r.Remedy)
	}
	return nil
}
