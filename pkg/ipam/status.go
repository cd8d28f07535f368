package ipam

import (
	"context"
	"errors"
	"time"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Status returns an error with code 50 and the remedy when this host cannot serve an ADD on the
// network, and waiting does not help. A kubelet evicts healthy pods after such an answer. So an
// absent store and a network without free addresses are errors of an ADD only. strict reports these
// too. A network that its configuration defines and that is not in use yet is ready. Its status is
// nil.
func Status(ctx context.Context, b Client, network string, d Definition, strict bool) (*metadata.NetworkStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	s, err := b.Service.Status(ctx, network)
	switch {
	case metadata.IsCode(err, metadata.CodeNotFound) && (d.Subnet != "" || len(d.Subnets) > 0):
		return nil, nil
	case metadata.IsCode(err, metadata.CodeNotFound):
		return nil, cni.Errorf(cni.ErrNotAvailable, "network %s: %w", network, err).WithDetails("lariat network create %s",
			network)
	case err == nil && !s.Ready && (s.Local || strict):
		return s, cni.Errorf(cni.ErrNotAvailable, "network %s: %s", network, s.Reason)
	case err == nil:
		return s, nil
	case !answered(err):
		return nil, cni.Errorf(cni.ErrNotAvailable, "network %s: %w", network,
			err).WithDetails("check: systemctl status lariat-metadata; lariat doctor")
	case strict:
		return nil, cni.Errorf(cni.ErrNotAvailable, "network %s: %w", network, err).WithDetails("check: lariat doctor")
	}
	return nil, nil
}

// answered reports whether the service itself returned the error.
func answered(err error) bool {
	var e *metadata.Error
	return errors.As(err, &e)
}
