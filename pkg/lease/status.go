package lease

import (
	"context"
	"time"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Status asks whether an ADD on the network would find an address; an error carries code 50 and the remedy. A network that
// its configuration defines and nobody has used yet is ready.
func Status(ctx context.Context, b Book, network string, d Definition) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	s, err := b.Client.Status(ctx, network)
	switch {
	case metadata.IsCode(err, metadata.CodeNotFound) && (d.Subnet != "" || len(d.Subnets) > 0):
		return nil
	case err != nil:
		return cni.Errorf(cni.ErrNotAvailable, "network %s: %w", network, err).WithDetails("check: systemctl status lariat-metadata; lariat doctor")
	case !s.Ready:
		return cni.Errorf(cni.ErrNotAvailable, "network %s: %s", network, s.Reason)
	}
	return nil
}
